"""The hooks that sit on modules: plain functions over weak registries.

Problem: a bound method among a module's hooks makes `deepcopy(module)` copy the mover, its threads and its streams with it
(I7). So the hooks are module-level functions, and what they act for is looked up by module in a weak registry. A copied
module carries the function but is not in the registry, and passes through untouched.

Four roles. *span*: one call is one pass. *unit*: acquire and release, in streamed passes, on streamed units only. *arrival*:
a resident on its way to the device for the first time; removes itself. *observed*: every module, in passes that move regions.
Post hooks are registered with `always_call`, which covers exceptions but not BaseException (the WebUI's interrupt): what is
left in use then is swept at the next pass's start, at leave and at drain.

Called on the thread that runs the network, on its current stream.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class Actor(Protocol):
    """What a hook acts for."""

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Pre-forward: None, or (args, kwargs) to use instead."""

    def after(self, module: nn.Module) -> None:
        """Post-forward, whatever happened inside short of a BaseException."""


class Registry:
    """Who acts for which module, which is held weakly. By identity: a `WeakKeyDictionary` makes a reference and hashes it at every look,
    and there are two looks per use of a unit."""

    def __init__(self) -> None:
        self.of: dict[int, Actor] = {}
        """By `id` of the module, while that lives."""
        self._living: dict[int, weakref.ref[nn.Module]] = {}

    def __len__(self) -> int:
        return len(self.of)

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self.of

    def __setitem__(self, module: nn.Module, actor: Actor) -> None:
        key = id(module)

        def gone(ref: weakref.ref, of: dict = self.of, living: dict = self._living) -> None:
            if living.get(key) is ref:  # else somebody else has come to this identity
                del living[key]
                of.pop(key, None)

        self._living[key] = weakref.ref(module, gone)
        self.of[key] = actor

    def pop(self, module: nn.Module) -> None:
        """Nobody acts for `module` from here on."""
        self._living.pop(id(module), None)
        self.of.pop(id(module), None)


_SPANS, _UNITS, _OBSERVED = Registry(), Registry(), Registry()


def _before(registry: Registry, module: nn.Module, args: tuple, kwargs: dict | None) -> Any:
    """`kwargs` is None when a hook that ran just before this one, in the same call, has taken this one off: torch calls it all
    the same, but no longer knows that it wants them. Whoever acts for the module now, if anybody, must hear of the call."""
    actor = registry.of.get(id(module))
    if actor is None:
        return None
    if kwargs is not None:
        return actor.before(module, args, kwargs)
    changed = actor.before(module, args, {})
    return None if changed is None else changed[0]


def _span_before(module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
    return _before(_SPANS, module, args, kwargs)


def _span_after(module: nn.Module, args: tuple, output: Any) -> None:
    actor = _SPANS.of.get(id(module))
    if actor is not None:
        actor.after(module)


def _unit_before(module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
    actor = _UNITS.of.get(id(module))
    if actor is None or kwargs is None:
        return _before(_UNITS, module, args, kwargs)
    return actor.before(module, args, kwargs)


def _unit_after(module: nn.Module, args: tuple, output: Any) -> None:
    actor = _UNITS.of.get(id(module))
    if actor is not None:
        actor.after(module)


def _observed_before(module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
    return _before(_OBSERVED, module, args, kwargs)


def _observed_after(module: nn.Module, args: tuple, output: Any) -> None:
    actor = _OBSERVED.of.get(id(module))
    if actor is not None:
        actor.after(module)


_ROLES: dict[str, tuple[Registry, Callable, Callable]] = {
    "span": (_SPANS, _span_before, _span_after),
    "unit": (_UNITS, _unit_before, _unit_after),
    "observed": (_OBSERVED, _observed_before, _observed_after),
}


@functools.cache
def _not_compiled(disable: Callable, hook: Callable) -> Callable:
    """`hook`, which torch.compile does not look into: it would try for a minute, and make one frame of a network, which wants all weights
    at once."""
    return disable(hook)


def _hooks_of(role: str) -> tuple[Registry, Callable, Callable]:
    """Where nobody has compiled anything yet, its machinery is not loaded for this: that takes seconds."""
    registry, before, after = _ROLES[role]
    disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)  # None as well while another thread is still importing it
    return (registry, _not_compiled(disable, before), _not_compiled(disable, after)) if disable else (registry, before, after)


class Installed:
    """One role's hooks on one module. Holds the module weakly; `remove` is idempotent."""

    __slots__ = ("_handles", "_module", "_registry")

    def __init__(self, role: str, module: nn.Module, actor: Actor) -> None:
        self._registry, before, after = _hooks_of(role)
        if module in self._registry:
            raise ValueError(f"{type(module).__name__} is already managed by a mover ({role})")
        self._registry[module] = actor
        self._module = weakref.ref(module)
        # First in, last out: other people's hooks on the module see the weights where the module itself does.
        self._handles = (
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        )

    def remove(self) -> None:
        """Take the hooks off."""
        module = self._module()
        if module is not None:
            self._registry.pop(module)
        for handle in self._handles:
            handle.remove()
        self._handles = ()
