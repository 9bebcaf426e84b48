"""What the hooks of each role do: small objects between `unit_hooks` (on modules) and a `Network`.

They take the mover's lock, so that a drain from another thread happens between two leaves and not within one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

from lib_async_lowvram.arguments import moved, shape_of
from lib_async_lowvram.device.weights import Unit

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


class SpanActor:
    """One call of the module is one pass."""

    __slots__ = ("_handled", "_network", "_open_ended")

    def __init__(self, network: Network, open_ended: bool) -> None:
        self._network = network
        self._open_ended = open_ended
        self._handled: BaseException | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        network = self._network
        self._handled = sys.exc_info()[1]
        with network.context.lock:
            network.begin_pass(shape=shape_of(args, kwargs))
            try:
                network.calls.running(module)
            except BaseException as error:
                if not network.met(error, goes_on=True, module=module):
                    raise
        return moved(args, kwargs, network.context.streams.device)

    def after(self, module: nn.Module) -> None:
        network = self._network
        if not self._open_ended:
            with network.context.lock:
                # Post hooks also run for an exception on its way out; a pass cut short teaches nothing.
                network.end_pass(complete=sys.exc_info()[1] is self._handled)
        self._handled = None


class UnitActor:
    """Acquire and release of one unit, in streamed passes."""

    __slots__ = ("_device", "_lock", "_network", "_unit")

    def __init__(self, network: Network, unit: Unit) -> None:
        self._network, self._unit = network, unit
        self._lock, self._device = network.context.lock, network.context.streams.device

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        with self._lock:
            try:
                self._network.calls.acquire(self._unit, module)
            except BaseException as error:
                if not self._network.met(error, goes_on=True, module=module):
                    raise
        return moved(args, kwargs, self._device)

    def after(self, module: nn.Module) -> None:
        with self._lock:
            try:
                self._network.calls.release(self._unit)
            except BaseException as error:
                if not self._network.met(error, goes_on=True, module=module):
                    raise


class ObserverActor:
    """Any module, while whole regions move."""

    __slots__ = ("_network",)

    def __init__(self, network: Network) -> None:
        self._network = network

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        network = self._network
        with network.context.lock:
            try:
                network.calls.observe(module)
            except BaseException as error:
                if not network.met(error, goes_on=True, module=module):
                    raise
        return moved(args, kwargs, network.context.streams.device) if module._parameters else None

    def after(self, module: nn.Module) -> None:
        network = self._network
        with network.context.lock:
            try:
                network.calls.observed(module)
            except BaseException as error:
                if not network.met(error, goes_on=True, module=module):
                    raise
