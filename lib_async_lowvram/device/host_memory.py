"""Host memory for masters: page-aligned, exactly as large as asked for, pinned up to a limit.

Problem: torch's pinned allocator rounds every request up to a power of two (1.2-1.3x on these models) and never gives
memory back; and memory that is pinned must be unpinned before it is unmapped, although tensors over it may be held by
anybody (a `state_dict` somebody kept) long after the mover is gone.

Solution: each block is one anonymous private mapping of our own `mmap.mmap` subclass. `torch.frombuffer` keeps that
object alive exactly as long as the storage; its `__del__` runs before the base class unmaps, so unpinning happens when
the storage dies, whoever held it last. (`weakref.finalize` would not do: `mmap`'s deallocation clears weak references
after the unmapping.)

Invariants: pinned bytes never exceed the limit; blocks hold the ledger and the ledger holds no block, so nothing here is
in a cycle and a block dies with its last reference.

Threads: any. Blocks may die on any thread, in the middle of anything (garbage collection), so a dying block takes no lock:
it changes the ledger by single dictionary operations, which the interpreter makes whole.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from .op_access import without_dispatch_modes
from .streams import Streams
from .weight_file import WeightFile

logger = logging.getLogger("async_lowvram")

WSL_PINNED_BYTES = 512 << 20
"""NVIDIA's "CUDA on WSL User Guide", WSL 2 support constraints: the availability of pinned system memory to applications is limited.
It gives no figure, and reports differ: 500 MB (microsoft/WSL issue 14078), about 1 GB (NVIDIA/nvidia-docker issue 1725), 0.75 to 1 GB
(FlashML-org/FreeToken pull request 233). What others in the process pin, and device memory too, fails when it is used up, so the
automatic limit keeps to the lowest."""


class _Ledger:
    """What lives and what is pinned, by address. Shared by a `HostMemory` and its blocks. What is pinned keeps the device that
    must unpin it; what is not keeps nothing, or a model would keep the device of a mover that is long gone."""

    __slots__ = ("living", "pinned")

    def __init__(self) -> None:
        self.living: dict[int, int] = {}
        self.pinned: dict[int, tuple[int, Streams]] = {}

    def unpin(self, address: int) -> None:
        """Undo a pin, if there is one."""
        _, streams = self.pinned.pop(address, (0, None))
        if streams is not None:
            streams.unpin(address)


class _Block(mmap.mmap):
    """One mapping. Unpins itself before it is unmapped."""

    def __new__(cls, nbytes: int) -> _Block:
        if sys.platform == "win32":
            return super().__new__(cls, -1, nbytes)
        # Private: shared anonymous memory would be shmem, and a forked child's writes would show.
        return super().__new__(cls, -1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __init__(self, nbytes: int) -> None:
        self.ledger: _Ledger | None = None
        self.address = 0

    def __del__(self) -> None:
        ledger = self.ledger
        if ledger is not None:
            ledger.unpin(self.address)
            ledger.living.pop(self.address, None)


class Borrower:
    """Somebody whose copies read blocks of a `HostMemory` that somebody else pins and unpins. `lock`: held whenever copies are
    enqueued. `streams`: that carry them."""

    def __init__(self, lock: AbstractContextManager, streams: Streams) -> None:
        self.lock, self.streams = lock, streams


class HostMemory:
    """Allocates and pins host blocks for one device.

    Attributes:
        pinned_limit_bytes: the most that is pinned at any time.
        refusals: how often `pin` said no, by the limit or by the device.
        borrowers: who else copies from these blocks; held weakly.
        files: whose weights need no block; see `weight_file`.
    """

    def __init__(self, streams: Streams, pinned_limit_bytes: int = 0) -> None:
        """`pinned_limit_bytes`: 0 for automatic (`default_pinned_limit_bytes`)."""
        self.set_limit(pinned_limit_bytes)
        self.refusals = 0
        self.borrowers: weakref.WeakSet[Borrower] = weakref.WeakSet()
        self.files: list[WeightFile] = []
        self._streams = streams
        self._ledger = _Ledger()
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A one-dimensional uint8 tensor of `nbytes` zeros, page-aligned, with a storage of exactly that size."""
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        # A tensor born in inference mode could never be changed in place outside of it.
        with torch.inference_mode(False), without_dispatch_modes():
            if nbytes == 0:
                return torch.empty(0, dtype=torch.uint8)
            block = _Block(nbytes)
            tensor = torch.frombuffer(block, dtype=torch.uint8, count=nbytes)
        block.address = tensor.data_ptr()
        block.ledger = self._ledger
        self._ledger.living[block.address] = nbytes
        return tensor

    def owns(self, storage: torch.UntypedStorage) -> bool:
        """Whether it is that of a living block from `allocate`."""
        return storage.device.type == "cpu" and self._ledger.living.get(storage.data_ptr()) == storage.nbytes() > 0

    def set_limit(self, pinned_limit_bytes: int) -> None:
        """Change the limit; 0 for automatic. What is pinned beyond it stays so until its owner unpins it."""
        self.pinned_limit_bytes = pinned_limit_bytes if pinned_limit_bytes > 0 else default_pinned_limit_bytes()

    def pin(self, block: torch.Tensor, kept_back: int = 0) -> bool:
        """Page-lock all of a block from `allocate` (any tensor over its whole storage will do). True when it is pinned
        now, before or by this call; False when refused, which is counted, and logged the first time. `kept_back`: bytes of
        the limit that are meant for something else."""
        address, nbytes = self._whole(block)
        if not nbytes:
            return True
        with self._lock:
            if address in self._ledger.pinned:
                return True
            wanted = self.pinned_bytes + nbytes
            if wanted + kept_back > self.pinned_limit_bytes:
                kept = f", {kept_back} of them kept for staging" if kept_back else ""
                self._refused(f"{nbytes} bytes more would be {wanted} of at most {self.pinned_limit_bytes}{kept}")
                return False
            if not self._streams.pin(address, nbytes):
                self._refused(f"{self._streams.name} would not pin {nbytes} bytes (pinned so far: {self.pinned_bytes})")
                return False
            self._ledger.pinned[address] = (nbytes, self._streams)
            return True

    def unpin(self, block: torch.Tensor) -> None:
        """Undo `pin`; a block that is not pinned stays so. The caller has made sure no copy still uses it."""
        address, nbytes = self._whole(block)
        with self._lock:
            if nbytes:
                self._ledger.unpin(address)

    @contextmanager
    def borrowers_held(self) -> Iterator[None]:
        """Inside, no borrower has a copy in flight, nor enqueues one. Blocks the host."""
        with ExitStack() as locks:
            for borrower in list(self.borrowers):
                locks.enter_context(borrower.lock)
                streams = borrower.streams
                streams.synchronize(streams.record(streams.onload_stream))
            yield

    def is_pinned(self, block: torch.Tensor) -> bool:
        """Whether the block is pinned now. Nothing at all counts as pinned: copying it blocks nobody."""
        address, nbytes = self._whole(block)
        return not nbytes or address in self._ledger.pinned

    @property
    def pinned_bytes(self) -> int:
        """Bytes pinned now, as requested; the last page of each block is locked whole."""
        return sum(nbytes for nbytes, _ in self._ledger.pinned.copy().values())

    @property
    def room(self) -> int:
        """Bytes that may be pinned yet; below 0 when the limit was lowered under what is pinned."""
        return self.pinned_limit_bytes - self.pinned_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of all living blocks, pinned or not."""
        return sum(self._ledger.living.copy().values())

    def _whole(self, block: torch.Tensor) -> tuple[int, int]:
        """(address, bytes) of the block under a tensor. ValueError when it is none of ours."""
        storage = block.untyped_storage()
        if not storage.nbytes():
            return 0, 0
        address = storage.data_ptr()
        nbytes = self._ledger.living.get(address)
        if nbytes is None:
            raise ValueError(f"the tensor at {address:#x} is not a block of this HostMemory")
        return address, nbytes

    def _refused(self, why: str) -> None:
        self.refusals += 1
        if self.refusals == 1:
            logger.warning("pinned memory refused: %s. Such weights travel more slowly.", why)


def default_pinned_limit_bytes(kernel_release: str | None = None) -> int:
    """40% of RAM on Windows, where the driver refuses more than half; 60% elsewhere, but at most `WSL_PINNED_BYTES` under WSL.
    `kernel_release`: of this system unless given (for tests)."""
    if sys.platform == "win32":
        return int(ram_bytes() * 0.4)
    limit = int(ram_bytes() * 0.6)
    return min(limit, WSL_PINNED_BYTES) if is_wsl(platform.release() if kernel_release is None else kernel_release) else limit


def is_wsl(kernel_release: str) -> bool:
    """Whether such a kernel is that of the Windows Subsystem for Linux: "5.15.167.4-microsoft-standard-WSL2", in the first version
    "4.4.0-19041-Microsoft"."""
    return "microsoft" in kernel_release.lower() or "wsl" in kernel_release.lower()


def ram_bytes() -> int:
    """Physical memory of this machine, in bytes."""
    if sys.platform == "win32":
        return _windows_ram_bytes()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _MemoryStatus(ctypes.Structure):
    """`MEMORYSTATUSEX` of the Windows API."""

    _fields_ = [("dwLength", ctypes.c_uint32), ("dwMemoryLoad", ctypes.c_uint32)] + [
        (name, ctypes.c_uint64)
        for name in (
            "ullTotalPhys",
            "ullAvailPhys",
            "ullTotalPageFile",
            "ullAvailPageFile",
            "ullTotalVirtual",
            "ullAvailVirtual",
            "ullAvailExtendedVirtual",
        )
    ]


def _windows_ram_bytes() -> int:
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        raise ctypes.WinError()  # type: ignore[attr-defined]
    return status.ullTotalPhys
