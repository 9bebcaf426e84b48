"""Which masters are pinned, and what travels how instead: the host memory tiers of one mover.

Problem: pinned memory is limited, by the user, by the system and by the driver, and what is not pinned would block the thread that
runs the network whenever it travels. Three tiers, best first:

- pinned: the device reads the master itself;
- staged: the master, or its place in a file (`device.weight_file`), is read through a small pinned ring by a thread of its own;
- pageable: no ring could be had either; the driver stages the bytes while the caller waits.

Invariants: masters and ring together never pin more than the limit. Where not everything can be pinned, the ring comes first: its
bytes are kept back when masters are pinned, and where others have them already, masters of units with nothing in flight give way.

A mover over another one's masters (`shadow`) pins nothing: they are not its own, and it runs on a thread that may wait.

Called by `contents`, `streaming` and the mover, under the mover's lock. Contents are held weakly (I7).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from lib_async_lowvram.core.states import HOST
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.staging import Stager, ring_bytes_for
from lib_async_lowvram.device.weights import Unit

if TYPE_CHECKING:
    from lib_async_lowvram.contents import Contents

TRIES = 2
"""A device that refuses the ring is asked again this often, after masters gave way."""


class Pinning:
    """See the module. `owns`: the masters are this mover's."""

    def __init__(self, host: HostMemory, stager: Stager, owns: bool) -> None:
        self._host = host
        self._stager = stager
        self._owns = owns
        self._contents: list[weakref.ref[Contents]] = []

    # -- whose masters -------------------------------------------------------------------------------------------------
    def join(self, contents: Contents) -> None:
        """Its masters count from now on."""
        self._contents = [ref for ref in self._contents if ref() is not None] + [weakref.ref(contents)]

    def leave(self, contents: Contents) -> None:
        """Its masters are not ours any more. Ring and thread go with the last that needed them. Nothing of it is in flight."""
        self._contents = [ref for ref in self._contents if ref() not in (None, contents)]
        if not any(self.unpinned(self._units())):
            self._stager.close()

    def _units(self) -> list[Unit]:
        return [unit for ref in self._contents if (contents := ref()) is not None for unit in contents.units]

    def unpinned(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """Those whose masters are not pinned now, or still in a file."""
        return (unit for unit in units if unit.nbytes and (unit.in_file is not None or not self._host.is_pinned(unit.master)))

    # -- pinning -------------------------------------------------------------------------------------------------------
    def pin(self, units: Iterable[Unit]) -> None:
        """Page-lock masters as far as the limit goes, the largest first: it is best spent where most bytes stream."""
        waiting = [unit for unit in self.unpinned(units) if not unit.borrowed]
        kept_back = 0
        from_files = any(unit.in_file is not None for unit in waiting)
        if self._owns and waiting and (from_files or sum(unit.nbytes for unit in waiting) > self._host.room):
            kept_back = max(0, self._wanted(waiting) - self._stager.ring_bytes)
        self._pin(waiting, kept_back)

    def _pin(self, units: Iterable[Unit], kept_back: int = 0) -> None:
        for unit in sorted(units, key=lambda unit: -unit.nbytes):
            if unit.nbytes and not unit.borrowed and unit.in_file is None:
                self._host.pin(unit.master, kept_back)

    def _wanted(self, units: Iterable[Unit]) -> int:
        """Bytes of a ring for these units."""
        return ring_bytes_for(max(unit.nbytes for unit in units), self._host.pinned_limit_bytes)

    def change_limit(self, pinned_limit_bytes: int) -> None:
        """Another limit (bytes; 0 = automatic), exactly, from now on. Nothing is in flight."""
        contents = [each for ref in self._contents if (each := ref()) is not None]
        self._stager.close()
        for each in contents:
            each.unpin()
        self._host.set_limit(pinned_limit_bytes)
        for each in contents:
            each.pin()

    # -- the ring ------------------------------------------------------------------------------------------------------
    def make_ready(self, units: Iterable[Unit]) -> None:
        """These are about to travel, and none of the mover's does now: have a ring, if any of them needs one."""
        waiting = list(self.unpinned(units))
        self._stager.refused = False
        if not waiting or not self._owns:
            return
        wanted = self._wanted(waiting)
        if wanted <= self._stager.ring_bytes:
            self._stager.refused = not wanted
            return
        self._stager.close()
        if self._host.room < wanted:
            self._make_room(wanted - self._host.room)
        for _ in range(TRIES):
            if self._stager.open(min(wanted, ring_bytes_for(wanted, self._host.room))):
                return
            self._make_room(wanted)  # the device's own limit may be the lower one
        self._stager.refused = not self._stager.open(min(wanted, ring_bytes_for(wanted, self._host.room)))
        if self._stager.refused:
            self._pin(self._units())  # what gave way did so for nothing

    def can_stage(self, units: Iterable[Unit]) -> bool:
        """Whether there is a ring that `make_ready` would leave as it is for these units."""
        waiting = list(self.unpinned(units))
        return bool(waiting and self._owns and 0 < self._wanted(waiting) <= self._stager.ring_bytes)

    def _make_room(self, nbytes: int) -> None:
        """Unpin masters that nobody copies from: as few as give `nbytes` back, and as little beyond that as they can."""
        idle = [unit for unit in self._units() if unit.nbytes and unit.in_file is None and not unit.borrowed and not in_flight(unit)]
        idle = sorted((unit for unit in idle if self._host.is_pinned(unit.master)), key=lambda unit: unit.nbytes)
        if not idle:
            return
        with self._host.borrowers_held():
            while idle and nbytes > 0:
                unit = next((unit for unit in idle if unit.nbytes >= nbytes), idle[-1])
                idle.remove(unit)
                self._host.unpin(unit.master)
                nbytes -= unit.nbytes

    # -- looking -------------------------------------------------------------------------------------------------------
    def figures(self) -> dict[str, object]:
        """For the status: units and bytes whose masters are not pinned, bytes of the ring, and how these units travel."""
        waiting = list(self.unpinned(self._units()))
        tier = "pinned" if not waiting else "pageable" if self._stager.refused or not self._owns else "staged"
        return {
            "tier": tier,
            "unpinned_units": len(waiting),
            "unpinned_bytes": sum(unit.nbytes for unit in waiting),
            "staging_bytes": self._stager.ring_bytes,
            "file_bytes": sum(unit.nbytes for unit in self._units() if unit.in_file is not None),
            "file_read_bytes": sum(file.read_bytes for file in self._host.files),
            "file_read_seconds": sum(file.read_seconds for file in self._host.files),
        }


def in_flight(unit: Unit) -> bool:
    """Whether any copy may read or write the unit's master, or any parameter point at a device copy."""
    return unit.state is not HOST or unit.memory is not None or unit.copied is not None or unit.written is not None
