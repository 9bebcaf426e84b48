"""The ring of a network in use: each streamed unit's place in it, who stands there, and copies into it.

Problem: a place in the ring is overwritten by copies that other streams issue, while its last reader may still be computing.
So a place is vacated *behind* an event, whoever comes next waits for that on the copy stream (never on the host, I3), and
nothing is allocated on the way (I2) - except for a unit that has no place: one that outgrew it since the plan was made, or
one that a unit in use calls, which the learning pass did not see. It gets a block of its own until it is vacated.

Called by `streaming` under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from lib_async_lowvram.core.plan import Plan
from lib_async_lowvram.core.ring import Ring
from lib_async_lowvram.core.states import HOST, IN_USE, ONLOADING, READY, WRITE_BACK
from lib_async_lowvram.core.steady import SteadyOrder, steady_order
from lib_async_lowvram.device.arena import Arena
from lib_async_lowvram.device.staging import last_of
from lib_async_lowvram.device.streams import Event, Stream, Streams
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.transfers import Transfers


class Slots:
    """See the module. Takes no memory itself: the ring is `arena`'s slab."""

    def __init__(self, streams: Streams, plan: Plan, units: Sequence[Unit], arena: Arena, transfers: Transfers) -> None:
        self._streams = streams
        self._units = units
        self._arena = arena
        self._transfers = transfers
        self._ring = Ring(plan.offsets, {unit: units[unit].nbytes for unit in plan.offsets}, plan.ring_bytes)
        self._own: dict[int, torch.Tensor] = {}  # blocks of units that have no place
        self._views: dict[int, torch.Tensor] = {}  # the units' places, as tensors: slicing takes longer than all else here
        self._hindered: Unit | None = None  # whose place was last found taken
        self._hindrance: Unit | None = None  # by whom

    # -- looking -------------------------------------------------------------------------------------------------------
    def outgrown(self, unit: Unit) -> bool:
        """Whether it no longer fits its place: fetched on demand until the next plan."""
        return unit.nbytes > self._ring.nbytes[unit.index]

    def fits(self, unit: Unit) -> bool:
        """Whether its place can be made free now: large enough, and nobody there is in use."""
        return not self.outgrown(unit) and not any(blocker.depth for blocker in self.blockers(unit))

    def move(self, offsets: Mapping[int, int]) -> None:
        """Another plan's places in the same ring."""
        self._ring.move(offsets, {unit: self._units[unit].nbytes for unit in offsets})
        self._views.clear()
        self._hindered = None  # what stood in its old place says nothing of the new one

    def _view(self, index: int) -> torch.Tensor:
        view = self._views.get(index)
        if view is None:
            view = self._views[index] = self._arena.slot(self._ring.offsets[index], self._ring.nbytes[index])
        return view

    @property
    def standing(self) -> list[Unit]:
        """Units that have a place taken."""
        return [self._units[index] for index in self._ring.live]

    @property
    def own_blocks(self) -> list[torch.Tensor]:
        """Memory of units without a place."""
        return list(self._own.values())

    def fences(self) -> dict[Hashable, Event]:
        """What whoever overwrites the ring must have waited for, by whose key."""
        return self._ring.fences()

    def steady_order(self, sequence: Sequence[int]) -> SteadyOrder | None:
        """See `core.steady`."""
        ring = self._ring
        return steady_order(sequence, ring.offsets, ring.nbytes, ring.ring_bytes)

    def is_bound(self, unit: Unit) -> bool:
        """Whether the unit's views are over its place in the ring, which is as large as it is."""
        view = self._views.get(unit.index)
        return view is not None and unit.memory is view and view.numel() == unit.nbytes

    def restore(self, live: Iterable[Unit], left: Mapping[Hashable, Event]) -> None:
        """See `Ring.restore`."""
        self._ring.restore([unit.index for unit in live], left)
        self._hindered = None

    def blockers(self, unit: Unit) -> list[Unit]:
        """Who stands in its place."""
        return [self._units[other] for other in self._ring.blockers(unit.index)]

    # -- taking and giving ---------------------------------------------------------------------------------------------
    def free_unwanted(self, unit: Unit) -> bool:
        """Free `unit`'s place if nobody stands there, or only copies nobody is waiting for. Whether it is free."""
        index, live, units = unit.index, self._ring.live, self._units
        # Asked again and again for the same unit: most times the one found there stands there still.
        blocker = self._hindrance
        if unit is self._hindered and blocker.index in live and (blocker.pending or blocker.depth):
            return False
        standing = self._ring.blockers(index)
        for other in standing:
            blocker = units[other]
            if blocker.pending or blocker.depth:
                self._hindered, self._hindrance = unit, blocker
                return False
        for other in standing:
            self.vacate(units[other], self._streams.current_stream())
        return True

    def evict(self, unit: Unit) -> bool:
        """Free the place of a unit that `fits` at once, dropping prefetched copies if need be. Whether any were dropped."""
        blockers = self.blockers(unit)
        for blocker in blockers:
            self.vacate(blocker, self._streams.current_stream())
        return bool(blockers)

    def vacate(self, unit: Unit, consumer: Stream) -> None:
        """Forget the device copy; its place may be overwritten after what has been enqueued so far."""
        streams = self._streams
        if unit.state is WRITE_BACK:
            fence, key = unit.written, "write-back"  # after the consumer's last use, too
        elif unit.state is ONLOADING:
            fence, key = last_of(unit.copied, streams), "onload"
            unit.copied = fence
            unit.to(HOST)
        else:
            fence, key = streams.record(consumer), consumer
            if unit.written is not None:
                # Kept after a change: the write-back that still reads the slot must be over as well.
                streams.wait(streams.offload_stream, fence)
                fence, key = streams.record(streams.offload_stream), "write-back"
            if unit.state is not HOST:
                if unit.state is IN_USE:
                    unit.to(READY)
                unit.to(HOST)
        unit.pending = 0
        own = self._own.pop(unit.index, None)
        if own is not None:
            unit.unbind()
            streams.free(own, (fence,))
            return
        ring = self._ring
        vacant = streams.discard(self._view(unit.index), fence)
        ring.vacate(unit.index, key if vacant is fence else ("discard", unit.index), vacant)

    def onload(self, unit: Unit, in_ring: bool = True) -> None:
        """Take `unit`'s place, free by now, or a block of its own, and enqueue its copy."""
        if unit.state is WRITE_BACK:
            unit.to(HOST)  # for the copy stream, which waits below; the host has not waited
        streams, ring = self._streams, self._ring
        if not in_ring:
            memory = self._own[unit.index] = streams.allocate(unit.nbytes)
        else:
            for fence in ring.occupy_free(unit.index):
                streams.wait(streams.onload_stream, fence)
            memory = self._view(unit.index)
        unit.bind(memory)
        self._transfers.onload(unit)

    def share(self, stream: Stream) -> None:
        """Autograd may keep views of the blocks of units without a place."""
        for block in self._own.values():
            self._streams.share(block, stream)

    def close(self, after: tuple[Event, ...]) -> None:
        """Give back the blocks of units without a place, behind `after`. The caller has dropped its views."""
        for block in self._own.values():
            self._streams.free(block, after)
        self._own.clear()
