"""Activations that wait on disk: for devices whose memory is main memory, where spilling to the host would be spilling to itself.

Problem: a process that computes on the CPU within a few hundred megabytes has nowhere to put the gigabytes that a large picture's VAE
keeps between two steps. They are written once, from the top, and read once or twice in the same order, which is what disks like; and the
system keeps them in its page cache as long as nobody else wants the memory.

Invariants: files have no name where the system allows that (`tempfile.TemporaryFile`), so nothing stays behind whatever happens; they are
read and written, never mapped, so that no page of them is counted as this process's memory.

On the thread that computes. Called by `space`.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from pathlib import Path

import torch

from lib_async_lowvram.device.dense import byte_range


class OutOfDiskSpace(OSError):
    """The disk is full; the message says which folder, and that another may be given."""


class DiskRoom:
    """A folder for spilled activations. `folder`: None is the system's for temporary files.

    Attributes:
        written_bytes, read_bytes: so far.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.written_bytes = self.read_bytes = 0

    def free_bytes(self) -> int:
        """Of the disk. OSError where there is no such folder, or nothing may be written there."""
        with tempfile.NamedTemporaryFile(dir=self.folder) as probe:
            return shutil.disk_usage(Path(probe.name).parent).free

    def __str__(self) -> str:
        return "the folder of temporary files" if self.folder is None else str(self.folder)

    def file(self) -> DiskFile:
        """An empty file of its own. OSError."""
        return DiskFile(self)


class DiskFile:
    """See the module. Gone when nobody holds it."""

    def __init__(self, room: DiskRoom) -> None:
        self._room = room
        self._file = tempfile.TemporaryFile(dir=room.folder, buffering=0, prefix="async-lowvram-")

    def write(self, place: int, values: torch.Tensor) -> None:
        """The bytes of `values` (dense, on the host) from byte `place` on."""
        left = _bytes(values)
        self._file.seek(place)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OutOfDiskSpace(error.errno, f"{error.strerror}: activations that wait are written to {self._room}") from error
        self._room.written_bytes += values.numel() * values.element_size()

    def read(self, place: int, into: torch.Tensor) -> None:
        """Fill `into` (dense, on the host) from byte `place` on. OSError where there is less."""
        left = _bytes(into)
        self._file.seek(place)
        while left:
            count = self._file.readinto(left)
            if not count:
                raise OSError(f"a file of activations in {self._room} is shorter than what was written")
            left = left[count:]
        self._room.read_bytes += into.numel() * into.element_size()


def _bytes(values: torch.Tensor) -> memoryview:
    start, end = byte_range(values)
    return memoryview((ctypes.c_char * (end - start)).from_address(start)).cast("B")
