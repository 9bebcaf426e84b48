"""Weights that stay in their file: a mapping that anybody may read, and reads straight into the memory that travels.

Problem: a model of gigabytes in main memory as well as in its file is more than owners of small GPUs have. So parameters may point at
a private mapping of the file instead of at memory of their own: whoever reads one reads the file (the system's page cache, which gives way
to anything), and whoever writes to one gets pages of his own, not the file. The mover does not read through the mapping, which would make
its pages resident in this process: it reads ranges of the file into the staging ring.

A unit whose parameters all lie in one file has a `FileMaster` in place of a master in main memory, until somebody changes it.

Invariant: a file that was changed since it was opened is noticed before its bytes are used (size and time of change); one that was
replaced under its name is still the old one here. Writes to the mapping that leave no trace (`.data`) must be told (`distrust`, through
`AsyncModelMover.mark_dirty`): the mover would go on reading the file.

Threads: any. Called by `weights` and `staging`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .dense import byte_range

CHANGED = "a file of weights was changed while they were read from it: load another checkpoint, and then this one again"
"""Without the file's name, which would go to the status as well."""


class WeightsChanged(OSError):
    """The file is not what it was when it was opened."""


class WeightFile:
    """One file of weights, mapped and open for reading.

    Attributes:
        path, nbytes: of the file.
        read_bytes, read_seconds: what `read` has read so far, and how long that took (page cache included).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises OSError where it cannot be read, ValueError for an empty one."""
        self.path = Path(path)
        self.read_bytes = 0
        self.read_seconds = 0.0
        self._descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._looked = self._look()
            self.nbytes = os.fstat(self._descriptor).st_size
            if not self.nbytes:
                raise ValueError(f"{self.path} is empty")
            with torch.inference_mode(False):
                storage = torch.UntypedStorage.from_file(str(self.path), False, self.nbytes)  # False: private
                self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (self.nbytes,), (1,))
        except BaseException:
            self._close()
            raise
        self._pointed: dict[int, tuple[weakref.ref[nn.Parameter], int]] = {}
        self._lock = threading.Lock()  # of the counters, and of the position where reads have none of their own

    @property
    def changed(self) -> bool:
        """Whether somebody has written to the file since it was opened: what it holds now is not what was loaded."""
        return self._look() != self._looked

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def tensor(self, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """The bytes from `offset` on as a tensor over the mapping. ValueError where they are not all there, or not aligned."""
        count = 1
        for extent in shape:
            count *= extent
        size = torch.empty((), dtype=dtype).element_size()
        if offset < 0 or offset + count * size > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + count * size} are not all in {self.path}, of {self.nbytes}")
        if offset % size:
            raise ValueError(f"byte {offset} of {self.path} is no place for {dtype}")
        with torch.inference_mode(False):
            # `.data`: with a version of its own. Otherwise all tensors over the mapping would share one, and none be told from another.
            return self._bytes[offset : offset + count * size].view(dtype).view(tuple(shape)).data

    def point(self, parameter: nn.Parameter, offset: int) -> None:
        """Its data are the file's bytes from `offset` on, from now on. ValueError as `tensor`."""
        parameter.data = self.tensor(offset, parameter.dtype, parameter.shape)
        key = id(parameter)
        self._pointed[key] = (weakref.ref(parameter, lambda _: self._pointed.pop(key, None)), parameter._version)

    def distrust(self, parameter: nn.Parameter) -> None:
        """Somebody wrote to it without a trace: what it points at is not the file's, whatever its version says."""
        key = id(parameter)
        self._pointed[key] = (weakref.ref(parameter, lambda _: self._pointed.pop(key, None)), -1)

    def is_true(self, parameter: nn.Parameter) -> bool:
        """Whether nobody has written to it since it pointed here; one that was made over the mapping counts from its making."""
        known = self._pointed.get(id(parameter))
        return parameter._version == (known[1] if known is not None and known[0]() is parameter else 0)

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Where in the file a dense tensor lies; None where that is elsewhere."""
        if tensor.device.type != "cpu":
            return None
        start, end = byte_range(tensor)
        base = self._bytes.data_ptr()
        return start - base if base <= start and end <= base + self.nbytes else None

    def read(self, into: torch.Tensor, offset: int) -> None:
        """Fill `into` (uint8, dense, on the host) with the bytes from `offset` on. WeightsChanged, OSError."""
        began = time.perf_counter()
        if self.changed:
            raise WeightsChanged(CHANGED)
        nbytes = into.numel()
        target = memoryview((ctypes.c_char * nbytes).from_address(into.data_ptr())).cast("B")
        done = 0
        while done < nbytes:
            found = self._read_some(target[done:], offset + done)
            if not found:
                raise WeightsChanged(CHANGED)
            done += found
        with self._lock:
            self.read_bytes += nbytes
            self.read_seconds += time.perf_counter() - began

    def _read_some(self, target: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [target], offset)
        with self._lock:  # Windows: one position for all
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            found = os.read(self._descriptor, len(target))
        target[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """No more reads; so it is when nobody holds this any more. The mapping lives as long as tensors over it do. Idempotent."""
        self._close()


@dataclass(frozen=True)
class FileMaster:
    """A unit's bytes, as they lie in a file. pieces: (place in the pack, offset in the file, bytes), by place; what no piece covers is
    padding."""

    file: WeightFile
    pieces: tuple[tuple[int, int, int], ...]
    nbytes: int

    def numel(self) -> int:
        """Bytes of the pack, as a uint8 tensor of it would say."""
        return self.nbytes

    def read(self, into: torch.Tensor, start: int) -> None:
        """Fill `into` with the bytes of the pack from `start` on. Raises as `WeightFile.read`; padding is left as it is."""
        end = start + into.numel()
        for place, offset, nbytes in self.pieces:
            first, last = max(place, start), min(place + nbytes, end)
            if first < last:
                self.file.read(into[first - start : last - start], offset + first - place)


def master_in_file(files: Iterable[WeightFile], places: Sequence[tuple[nn.Parameter, int]], nbytes: int) -> FileMaster | None:
    """For a pack of these parameters, each at its place: where it can be read from, if all of it lies in one of `files` and nobody has
    written to it since (its version says so)."""
    for file in files:
        pieces: dict[int, tuple[int, int, int]] = {}
        for parameter, place in places:
            offset = file.offset_of(parameter)
            if offset is None or not file.is_true(parameter):
                break
            pieces[place] = (place, offset, parameter.numel() * parameter.element_size())
        else:
            if pieces:
                return FileMaster(file, tuple(sorted(pieces.values())), nbytes)
    return None
