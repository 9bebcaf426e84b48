"""Memory of the simulated device: CPU tensors under a hard cap, poisoned while they hold nothing.

Problem: on a GPU, memory that was never written, or was given back, holds something; what, nobody knows, and too often it
is yesterday's right answer. Here it holds NaN. The cap makes I2 (bounded by construction) testable: beyond it
`torch.cuda.OutOfMemoryError` is raised, worded as torch words it.

Called by `simulated.py` on any thread; locks for itself.
"""

from __future__ import annotations

import ctypes
import threading

import torch

from .address_ranges import AddressRanges
from .op_access import without_dispatch_modes
from .streams import ALIGNMENT, align


def poison(memory: torch.Tensor) -> None:
    """Fill with 0xFF bytes: NaN in every float format. No dispatch mode sees it, and the GIL is free meanwhile."""
    if memory.numel():
        ctypes.memset(memory.data_ptr(), 0xFF, memory.numel())


class SimulatedMemory:
    """Blocks by address. Sizes count as torch's allocator counts them: rounded up to `ALIGNMENT`.

    Attributes:
        allocated_bytes, peak_bytes: as in `Streams`. version: another object after every allocation and free.
    """

    def __init__(self, capacity_bytes: int, whole: SimulatedMemory | None = None) -> None:
        """`whole`: the memory that this one is a part of, with books of its own and no capacity of its own."""
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = self.peak_bytes = 0
        self.version = object()
        self._whole = whole
        self._in_parts = 0
        self._lock = threading.RLock() if whole is None else whole._lock
        self._blocks = AddressRanges()
        self._recycled: dict[int, list[torch.Tensor]] = {}
        self._recycled_bytes = 0

    @property
    def free_bytes(self) -> int:
        if self._whole is not None:
            return self._whole.free_bytes
        return max(0, self.capacity_bytes - self.allocated_bytes - self._in_parts)

    def part(self) -> SimulatedMemory:
        """Books of their own over the same memory."""
        return SimulatedMemory(self.capacity_bytes, self)

    def _book(self, size: int) -> None:
        self.allocated_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)
        if self._whole is not None:
            self._whole._in_parts += size

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A uint8 block at an address that is a multiple of `ALIGNMENT`. Its contents are the caller's to poison."""
        size = align(nbytes)
        with self._lock:
            if size > self.free_bytes:
                raise torch.cuda.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {_human(size)}. GPU 0 (simulated) has a total capacity of "
                    f"{_human(self.capacity_bytes)} of which {_human(self.free_bytes)} is free."
                )
            recycled = self._recycled.get(nbytes)
            if recycled:
                block = recycled.pop()
                self._recycled_bytes -= size
                return self._enter(block, size)
            # A tensor born in inference mode could never be changed in place outside of it.
            with torch.inference_mode(False), without_dispatch_modes():
                raw = torch.empty(size + ALIGNMENT if size else 0, dtype=torch.uint8)
                block = raw[-raw.data_ptr() % ALIGNMENT :][:nbytes] if size else raw
            return self._enter(block, size)

    def _enter(self, block: torch.Tensor, size: int) -> torch.Tensor:
        if size:
            self._blocks.add(block.data_ptr(), block.data_ptr() + block.numel())
            self.version = object()
        self._book(size)
        return block

    def recycle(self, block: torch.Tensor) -> None:
        """Keep the memory of a freed block that nothing uses any more for the next request of its size: a device's memory is
        there, while the host's is mapped page by page when it is first written, which takes longer than a fast link."""
        size = align(block.numel())
        with self._lock:
            if size and self._recycled_bytes + size <= self.free_bytes:
                self._recycled.setdefault(block.numel(), []).append(block)
                self._recycled_bytes += size

    def free(self, block: torch.Tensor) -> None:
        """Take a block out of the books. ValueError unless it is a living one, whole."""
        nbytes = block.numel()
        if not nbytes:
            return
        begin = block.data_ptr()
        with self._lock:
            if self._blocks.find(begin) != (begin, begin + nbytes):
                raise ValueError("free of memory that is not a living block of this device (freed twice, or a part of one?)")
            self._blocks.remove(begin)
            self.version = object()
            self._book(-align(nbytes))

    def reset_peak(self) -> None:
        with self._lock:
            self.peak_bytes = self.allocated_bytes

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether all bytes of the contiguous `tensor` lie inside one living block."""
        begin = tensor.data_ptr()
        with self._lock:
            return not tensor.numel() or self._blocks.contains(begin, begin + tensor.nbytes)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any living block shares a byte with [start, end)."""
        with self._lock:
            return self._blocks.overlaps(start, end)

    def ranges(self) -> list[tuple[int, int]]:
        """[start, end) of every living block, ascending."""
        with self._lock:
            return list(self._blocks)


def _human(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.2f} MiB"
