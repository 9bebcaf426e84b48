"""What stock `--lowvram` has put on a model: finding it, standing in for it, and putting it back object for object.

Problem: stock hooks about thirty modules with one closure, `send_me_to_gpu`, and wraps the VAE's `encode` and `decode` as
instance attributes. We want every difference between versions of stock, but not its moves.
Invariants: I6 - a stand-in takes the place of a stock hook under the same hook id, so their order among other hooks is kept,
and carries the stock function it stands in for, so the very same object can go back. I7 - nothing here holds a model: the
`Link` between stand-ins and the integration keeps weak references, and a stand-in, being a plain function, is shared by a
`deepcopy` of its module; the copy is unknown to the link and gets stock's behaviour.
Called while a model is set up (the loading thread) and when it is given back; stand-ins run on the thread that calls the
model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

HOOK_NAME = "send_me_to_gpu"
HOOK_MODULE = "modules.lowvram"
VAE_METHODS = ("encode", "decode")


class Listener(Protocol):
    """What the integration offers to the stand-ins."""

    def pass_starting(self, link: Link, network: str) -> None:
        """A network ("unet", "text" ...) is about to be called: before the mover's own hooks see it."""

    def region_entered(self, link: Link) -> None:
        """A module that stock would now move is about to run."""

    def vae_pass(self, link: Link, method: str) -> AbstractContextManager[None]:
        """Opened around the VAE's own `encode` or `decode`."""


class Link:
    """What the stand-ins of one model know.

    Attributes:
        names: network of the model ("unet", "vae_decode") -> its name at the mover, which may serve several models.
        listener: None once put back: every stand-in somebody still holds is stock again.
        modules: the modules whose stock hook has a stand-in; not their copies.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.listener: Listener | None = None
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._spans: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
        self._handles: list[RemovableHandle] = []

    def watch_pass_start(self, network: str, span: nn.Module) -> None:
        """Tell the listener before a call of `span`. Prepended, so after `attach` it comes before the mover's own hook: what
        stock has on the device is off it, and the settings are read, when the pass begins."""

        def before_pass(module: nn.Module, args: Any) -> None:
            if self.listener is not None and module in self._spans:  # not in a copy of it
                self.listener.pass_starting(self, self._spans[module])

        self._spans[span] = network
        self._handles.append(span.register_forward_pre_hook(before_pass, prepend=True))

    def cut(self) -> None:
        """No more calls to the listener; our own hooks come off."""
        self.listener = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def is_stock_hook(function: Any) -> bool:
    return getattr(function, "__name__", "") == HOOK_NAME and getattr(function, "__module__", "") == HOOK_MODULE


def closure_of(function: Any) -> dict[str, Any]:
    """The variables a closure has captured, by name; empty for anything that is not a plain closure."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    found = {}
    for name, cell in zip(names, cells, strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # a cell that is still empty
            continue
    return found


def stock_hooks(module: nn.Module) -> Iterator[tuple[int, Callable]]:
    """The (hook id, function) pairs of stock on `module` itself."""
    for hook_id, function in module._forward_pre_hooks.items():
        if is_stock_hook(function):
            yield hook_id, function


@dataclass
class Harvest:
    """Stock's work on one model. Short-lived: it holds the modules strongly, between finding the hooks and swapping them.

    Attributes:
        hooked: modules with a stock hook, in the order of `named_modules`, with (hook id, stock function).
        parents: stock's own table: a hooked module -> the module that moves in its place.
        vae_wraps: "encode"/"decode" -> (stock's wrap, the method it wraps), for those that are stock's and understood.
    """

    model: nn.Module
    hooked: list[tuple[nn.Module, int, Callable]] = field(default_factory=list)
    parents: dict[nn.Module, nn.Module] = field(default_factory=dict)
    vae_wraps: dict[str, tuple[Callable, Callable]] = field(default_factory=dict)

    @property
    def vae(self) -> nn.Module | None:
        return getattr(self.model, "first_stage_model", None)

    def region_of(self, module: nn.Module) -> nn.Module:
        """The module stock would move when `module` is called."""
        return self.parents.get(module, module)

    def leave_vae_to_stock(self) -> None:
        """Take the VAE out, so that `swap_in` leaves stock's hook and wraps on it."""
        self.hooked = [entry for entry in self.hooked if entry[0] is not self.vae]
        self.vae_wraps = {}


def vae_originals(model: nn.Module) -> dict[str, Callable]:
    """The VAE's `encode` and `decode` as they are now. Asked for *before* stock's setup, they are the ones stock wraps."""
    vae = getattr(model, "first_stage_model", None)
    return {name: getattr(vae, name) for name in VAE_METHODS if callable(getattr(vae, name, None))}


def harvest(model: nn.Module, originals: dict[str, Callable] | None = None) -> Harvest:
    """Find stock's hooks on `model`. `originals`: from `vae_originals`; without them they are read from stock's closures."""
    found = Harvest(model)
    for module in model.modules():
        for hook_id, function in stock_hooks(module):
            found.hooked.append((module, hook_id, function))
            found.parents.update(closure_of(function).get("parents", {}))
    for name in VAE_METHODS:
        wrap = vars(found.vae).get(name) if found.vae is not None else None
        if wrap is None or getattr(wrap, "__module__", "") != HOOK_MODULE:
            continue  # not wrapped, or wrapped again by somebody else: then stock's wrap must keep running inside theirs
        captured = closure_of(wrap)
        original = (originals or {}).get(name) or captured.get(f"first_stage_model_{name}")
        if callable(original) and any(is_stock_hook(value) for value in captured.values()):
            found.vae_wraps[name] = (wrap, original)
    return found


def hook_stand_in(stock: Callable, link: Link) -> Callable:
    """A forward pre-hook in the place of `stock`."""

    def stands_in_for_stock(module: nn.Module, args: Any) -> Any:
        listener = link.listener
        if listener is None or module not in link.modules:
            return stock(module, args)
        listener.region_entered(link)
        return None

    stands_in_for_stock.stock = stock
    return stands_in_for_stock


def vae_stand_in(stock: Callable, original: Callable, method: str, link: Link) -> Callable:
    """A VAE method in the place of stock's wrap: the original one, inside a pass of the mover."""

    def stands_in_for_stock(*args: Any, **kwargs: Any) -> Any:
        listener = link.listener
        if listener is None:
            return stock(*args, **kwargs)
        with listener.vae_pass(link, method):
            return original(*args, **kwargs)

    stands_in_for_stock.stock = stock
    return stands_in_for_stock


def _is_stand_in(function: Any) -> bool:
    return getattr(function, "__module__", "") == __name__ and hasattr(function, "stock")


def swap_in(found: Harvest, link: Link, listener: Listener) -> None:
    """Put stand-ins in the place of everything harvested. From here on stock moves none of it."""
    for module, hook_id, function in found.hooked:
        module._forward_pre_hooks[hook_id] = hook_stand_in(function, link)
        link.modules.add(module)
    for method, (wrap, original) in found.vae_wraps.items():
        setattr(found.vae, method, vae_stand_in(wrap, original, method, link))
    link.listener = listener


def put_back(model: nn.Module | None, link: Link) -> None:
    """Stock's own objects go back under the ids and names they had. A stand-in that somebody has wrapped, or copied along
    with its module, passes through from now on."""
    link.cut()
    for module in list(link.modules):
        for hook_id, function in list(module._forward_pre_hooks.items()):
            if _is_stand_in(function):
                module._forward_pre_hooks[hook_id] = function.stock
    vae = getattr(model, "first_stage_model", None)
    for method in VAE_METHODS if vae is not None else ():
        wrap = vars(vae).get(method)
        if _is_stand_in(wrap):
            setattr(vae, method, wrap.stock)
