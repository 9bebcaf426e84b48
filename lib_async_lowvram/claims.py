"""Which modules can be managed, and which are already: two movers on one module would each take the other's copies for changes.

Claims are held weakly, by module. A network claims its modules when it looks at its tree and gives them up when it is detached. What
somebody else moves (accelerate, diffusers' group offloading), and what has no leaves that announce themselves (a compiled, traced or
scripted module), is refused before anything is touched, with what to do instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from lib_async_lowvram.modules import ModuleTree
from lib_async_lowvram.network_spec import NetworkSpec

_CLAIMED: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


class Refused(ValueError):
    """A network that cannot be managed; the text says why and what to do, and holds nothing private."""


def claim(modules: Iterable[nn.Module], owner: object) -> None:
    """`owner` (held weakly) manages these modules."""
    mine = weakref.ref(owner)
    for module in modules:
        _CLAIMED[module] = mine


def release(owner: object) -> None:
    """`owner` manages nothing any more."""
    for module, held_by in list(_CLAIMED.items()):
        if held_by() is owner or held_by() is None:
            del _CLAIMED[module]


def refuse_unmanageable(spec: NetworkSpec) -> None:
    """Raises `Refused` when a module of `spec` is managed already, is moved by somebody else, or cannot be followed; nothing has been
    touched then."""
    tree = ModuleTree(spec).scan()
    for module in [*tree.modules, *([spec.span] if spec.span is not None else [])]:
        held_by = _CLAIMED.get(module)
        reason = "is already managed by a mover" if held_by is not None and held_by() is not None else _obstacle(module)
        if reason:
            raise Refused(f"{tree.names.get(id(module), '')} ({type(module).__name__}) {reason}".strip())


def _obstacle(module: nn.Module) -> str:
    """Why this module's weights cannot be moved by us, or ""."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is traced or scripted, and its layers do not say when they run: attach the module that it was made from"
    if hasattr(module, "_orig_mod"):  # torch.compile's wrapper
        return "is compiled: attach the module that it was made from (`_orig_mod`), after compiling"
    if getattr(module, "_hf_hook", None) is not None:
        return (
            "is moved by accelerate (cpu_offload, device_map, diffusers' enable_sequential_cpu_offload or enable_model_cpu_offload): take "
            "its hooks off first (accelerate.hooks.remove_hook_from_module(module, recurse=True))"
        )
    registered = getattr(getattr(module, "_diffusers_hook", None), "hooks", None) or {}
    if any("group_offloading" in str(name) for name in registered):
        return "is moved by diffusers' group offloading: use one of the two"
    if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
        return "has no weights yet (meta device): load them first"
    return ""
