"""From one plan to another while the network stays in use: residents are shed at once, and grow as they stream past.

Problem: pictures of another size, a budget that grew or shrank, better measurements - each may call for other residents in the
middle of a job. Leaving and entering again would copy every resident once more and start with an empty ring.

The ring stays, and so does what stands in it. A resident that is to stream is dropped between two passes: its next use finds it
prefetched like any other. A streamed unit that is to be resident passes through the ring for a last time; its next copy goes
to a block of its own instead, in its turn. So nothing is copied that would not have been, and no pass waits.

I2: blocks to grow into are taken after what is shed has been given back, and the new plan fits its budget.
Called by `streaming` under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_async_lowvram.core.plan import Plan
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.residents import Residents
from lib_async_lowvram.slots import Slots

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


class Changeover:
    """See the module."""

    def __init__(self, network: Network, slots: Slots, residents: Residents) -> None:
        self._network = network
        self._units = network.contents.units
        self._slots = slots
        self._residents = residents
        self._growing: set[int] = set()  # to be residents: streaming for the last time
        self.grown: set[int] = set()
        """That is over: their next copies belong to the next pass, and to blocks of their own."""

    @property
    def under_way(self) -> bool:
        """Whether anything passes through the ring for the last time, or has."""
        return bool(self._growing or self.grown)

    def to(self, plan: Plan) -> None:
        """Between two passes, when all residents have arrived and were swept: follow `plan`, whose ring is as large. Raises torch's
        out-of-memory error when there is no room to grow, with nothing grown."""
        units = self._units
        wanted = plan.resident
        for unit in units:
            if unit.resident and unit.index not in wanted:
                self._residents.shed(unit)
        for index in self._growing - wanted:  # a pass cut short left them streaming, with a block in reserve
            self._residents.give_up_room(units[index])
        self._growing = {index for index in wanted if not units[index].resident}
        self.grown.clear()
        self._slots.move(plan.offsets)
        try:
            for index in self._growing:
                self._residents.make_room(units[index])
        except BaseException:
            for index in self._growing:
                self._residents.give_up_room(units[index])
            self._growing.clear()
            raise
        finally:
            self._reorder()
        self._network.counters.replanned += 1

    def released(self, unit: Unit) -> None:
        """A streamed unit has been used, and its place vacated."""
        if unit.index in self._growing:
            self._growing.discard(unit.index)
            self.grown.add(unit.index)

    def next_pass(self) -> bool:
        """A pass begins: those that have streamed for the last time arrive in it. Whether the order is another one now."""
        if not self.grown:
            return False
        for index in self.grown:
            self._residents.expect(self._units[index])
        self.grown.clear()
        self._reorder()
        return True

    def _reorder(self) -> None:
        network = self._network
        network.order.learn(unit for unit, _ in network.learned.steps if not self._units[unit].resident)
