"""Which hooks of one network are on now.

Streamed units carry acquire and release hooks as long as the network has a plan; residents only until they have arrived;
every module carries observers while whole regions move. Called by `network` under the mover's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_async_lowvram.actors import ObserverActor, SpanActor, UnitActor
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.unit_hooks import Installed

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


class HookSet:
    """Installs and removes; asking for what is there already changes nothing."""

    def __init__(self, network: Network, open_ended: bool) -> None:
        self._network = network
        self._units: dict[int, Installed] = {}
        self._observers: list[Installed] = []
        span = network.contents.span
        self._span = Installed("span", span, SpanActor(network, open_ended)) if span is not None else None

    def observe(self, on: bool) -> None:
        """Observers on every module, or on none."""
        if on and not self._observers:
            actor = ObserverActor(self._network)
            self._observers = [Installed("observed", module, actor) for module in self._network.contents.to_observe()]
        elif not on:
            for installed in self._observers:
                installed.remove()
            self._observers = []

    def units_on(self) -> None:
        """Acquire and release hooks on every unit that has an announcing anchor."""
        for unit in self._network.contents.units:
            self.unit_on(unit)

    def unit_on(self, unit: Unit) -> None:
        """The same on one."""
        announced = unit.index in self._network.contents.announced
        if announced and unit.index not in self._units and (module := unit.anchor()) is not None:
            self._units[unit.index] = Installed("unit", module, UnitActor(self._network, unit))

    def unit_off(self, unit: Unit) -> None:
        """Take one unit's hooks off: a resident that has arrived."""
        installed = self._units.pop(unit.index, None)
        if installed is not None:
            installed.remove()

    def units_off(self) -> None:
        """Take all units' hooks off."""
        for installed in self._units.values():
            installed.remove()
        self._units.clear()

    def remove(self) -> None:
        """Take every hook off."""
        self.units_off()
        self.observe(False)
        if self._span is not None:
            self._span.remove()
            self._span = None
