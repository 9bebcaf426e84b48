"""Which addresses belong to us: sorted sets of byte ranges with O(log n) look-up.

Problem: the judges (placement checker, recorder) and the simulated device see bare addresses, and must tell quickly
whether one lies in a device block, in pinned memory or in a host master. Addresses are used again after memory dies, so
a set that outlives what it describes would accuse innocent tensors.

Three kinds: `AddressRanges` is explicit (its owner adds and removes, and locks); `PinnedRanges` may be left from inside
the garbage collector; `HostRanges` follows the life of torch storages by weak reference (I7: it keeps nothing alive).
The latter two may be used from any thread.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .op_access import byte_range


class AddressRanges:
    """A sorted set of disjoint ranges [start, end). Not locked: the owner is."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self):
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def add(self, start: int, end: int) -> None:
        """Add [start, end). ValueError when it is empty or overlaps one that is there."""
        if end <= start or self.overlaps(start, end):
            raise ValueError(f"range {start:#x}..{end:#x} is empty or overlaps a known one")
        index = bisect_right(self._starts, start)
        self._starts.insert(index, start)
        self._ends.insert(index, end)

    def remove(self, start: int) -> tuple[int, int]:
        """Remove and return the range that begins at `start`. KeyError when there is none."""
        index = bisect_right(self._starts, start) - 1
        if index < 0 or self._starts[index] != start:
            raise KeyError(start)
        return self._starts.pop(index), self._ends.pop(index)

    def find(self, address: int) -> tuple[int, int] | None:
        """The range that holds `address`."""
        index = bisect_right(self._starts, address) - 1
        return (self._starts[index], self._ends[index]) if index >= 0 and address < self._ends[index] else None

    def contains(self, start: int, end: int) -> bool:
        """Whether one range holds all of [start, end)."""
        found = self.find(start)
        return found is not None and end <= found[1]

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any range shares a byte with [start, end)."""
        index = bisect_right(self._starts, end - 1) - 1
        return index >= 0 and self._ends[index] > start


class PinnedRanges:
    """What is pinned. `remove` takes no lock: the garbage collector may call it in the middle of any other method, when a
    block dies; it is carried out before anything is next looked up or added.

    Attributes:
        version: another object after every addition and removal.
    """

    def __init__(self) -> None:
        self.version = object()
        self._lock = threading.Lock()
        self._ranges = AddressRanges()
        self._removed: deque[int] = deque()

    def add(self, address: int, nbytes: int) -> bool:
        """False, and nothing is added, when some of it is pinned already."""
        with self._lock:
            self._settle()
            if self._ranges.overlaps(address, address + nbytes):
                return False
            self._ranges.add(address, address + nbytes)
            self.version = object()
            return True

    def remove(self, address: int) -> None:
        """Forget the range that begins at `address`, if any does."""
        self._removed.append(address)
        self.version = object()

    def contains(self, address: int, nbytes: int) -> bool:
        """Whether all of [address, address + nbytes) is pinned by one range."""
        with self._lock:
            self._settle()
            return self._ranges.contains(address, address + nbytes)

    def _settle(self) -> None:
        while self._removed:
            address = self._removed.popleft()
            found = self._ranges.find(address)
            if found is not None and found[0] == address:
                self._ranges.remove(address)


class _Entry:
    """One merged range and the storages it stands for."""

    __slots__ = ("end", "owners", "start")

    def __init__(self, start: int, end: int, owners: list[StorageWeakRef]) -> None:
        self.start, self.end, self.owners = start, end, owners

    def alive(self) -> bool:
        return any(not owner.expired() for owner in self.owners)


class HostRanges:
    """The host storages that hold weights: masters and buffers. Weak: a storage that dies is no longer in the set.

    A storage is in the set as a whole, however small the tensor it was added by. Storages that share memory (two
    `torch.frombuffer` over one mapping) are merged into one range, which lasts as long as any of them.
    """

    def __init__(self, on_drop: Callable[[int, int], None] | None = None) -> None:
        """`on_drop(start, end)` is called for each range found dead or removed, by the thread that found it."""
        self._lock = threading.RLock()
        self._starts: list[int] = []
        self._entries: list[_Entry] = []
        self._on_drop = on_drop

    def __len__(self) -> int:
        with self._lock:
            return sum(entry.alive() for entry in self._entries)

    def add(self, tensor: torch.Tensor) -> None:
        """Add the storage of `tensor`. One that is there already, or has no memory, changes nothing."""
        if byte_range(tensor) is None:
            return
        storage = tensor.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        owners = [StorageWeakRef(storage)]
        with self._lock:
            for index in self._overlapping(start, end):
                entry = self._entries[index]
                if entry.start <= start and end <= entry.end and any(o.cdata == owners[0].cdata for o in entry.owners):
                    return
            for index in reversed(self._overlapping(start, end)):
                entry = self._entries[index]
                start, end = min(start, entry.start), max(end, entry.end)
                owners += entry.owners
                del self._starts[index], self._entries[index]
            index = bisect_right(self._starts, start)
            self._starts.insert(index, start)
            self._entries.insert(index, _Entry(start, end, owners))

    def remove(self, tensor: torch.Tensor) -> None:
        """Take the storage of `tensor` out again. One that is not there changes nothing."""
        if byte_range(tensor) is None:
            return
        storage = tensor.untyped_storage()
        gone = StorageWeakRef(storage).cdata
        with self._lock:
            for index in reversed(self._overlapping(storage.data_ptr(), storage.data_ptr() + storage.nbytes())):
                entry = self._entries[index]
                entry.owners = [owner for owner in entry.owners if owner.cdata != gone]
                if not entry.owners:
                    self._drop(index)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether a living storage of the set shares a byte with [start, end)."""
        with self._lock:
            return bool(self._overlapping(start, end))

    def _overlapping(self, start: int, end: int) -> list[int]:
        """Indices, ascending, of living entries that share a byte with [start, end); dead ones met are dropped."""
        found: list[int] = []
        index = bisect_right(self._starts, end - 1) - 1
        while index >= 0 and self._entries[index].end > start:
            if self._entries[index].alive():
                found.append(index)
            else:
                self._drop(index)
                found = [later - 1 for later in found]
            index -= 1
        return found[::-1]

    def _drop(self, index: int) -> None:
        entry = self._entries.pop(index)
        del self._starts[index]
        if self._on_drop is not None:
            self._on_drop(entry.start, entry.end)
