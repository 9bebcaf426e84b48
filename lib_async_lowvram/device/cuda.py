"""`Streams` for CUDA, and for ROCm, whose torch speaks the same names.

Problem: the mover needs two copy streams beside whatever stream the model computes on, with everything ordered by events
on the device and nothing by the host.

Rules kept here, each of which somebody else broke (peers.md):
- the consumer's current stream is read before any copy context is entered (`current_stream` is never called inside one);
- device, with its index, is named for every stream, event and query: WebUI never calls `set_device`;
- no `record_stream`: blocks are allocated on the device's *default* stream and belong to it; `free` makes that stream
  wait for the last uses elsewhere, and `allocate` makes the copy streams and the caller's stream wait for it;
- pinning registers exact ranges; a refusal's pending error is cleared (`cuda_errors.py`).

Invariants: I2, I3, I7 (streams are made on construction, not on import), I8. Threads: any.
"""

from __future__ import annotations

import logging
import mmap
import sys
import threading
from contextlib import AbstractContextManager

import torch

from .address_ranges import PinnedRanges
from .cuda_errors import PendingError
from .op_access import without_dispatch_modes
from .streams import Event, Stream, Streams, align

logger = logging.getLogger("async_lowvram")

_PORTABLE = 1
"""`cudaHostRegisterPortable`: pinned for every context of the process."""


class CudaEvent(Event):
    """A `torch.cuda.Event` that was recorded when it was made."""

    __slots__ = ("inner", "timing")

    def __init__(self, inner: torch.cuda.Event, timing: bool) -> None:
        self.inner, self.timing = inner, timing


class CudaStreams(Streams):
    """See the module's docstring. `stall_seconds` stays 0.0: knowing it would take timing events on the compute stream
    (`record(timing=True)` around a wait, and `elapsed` later), which is the caller's choice."""

    knows_stalls = False

    def __init__(self, device: torch.device | str | None = None, *, errors: PendingError | None = None) -> None:
        """`device`: None for the current CUDA device. `errors`: for tests."""
        device = torch.device("cuda" if device is None else device)
        if device.type != "cuda":
            raise ValueError(f"CudaStreams is for CUDA devices, not {device}")
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.name = f"{self.device} {torch.cuda.get_device_name(self.device)}"
        self.onload_stream = torch.cuda.Stream(self.device)
        self.offload_stream = torch.cuda.Stream(self.device)
        self.host_waits = 0
        self._owner = torch.cuda.default_stream(self.device)
        self._errors = PendingError() if errors is None else errors
        self._cudart = torch.cuda.cudart()
        self._lock = threading.Lock()
        self._pinned = PinnedRanges()
        self._blocks: dict[int, int] = {}
        self._allocated = self._peak = 0
        self._seen_peak = self._others_peak = 0
        self._told_uncleared = False

    # -- streams and events --------------------------------------------------------------------------------------------
    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        event = torch.cuda.Event(enable_timing=timing)
        event.record(stream)
        return CudaEvent(event, timing)

    def wait(self, stream: Stream, event: Event) -> None:
        stream.wait_event(_cuda(event).inner)

    def done(self, event: Event) -> bool:
        return _cuda(event).inner.query()

    def synchronize(self, event: Event) -> None:
        with self._lock:
            self.host_waits += 1
        self.outwait(event)

    def outwait(self, event: Event) -> None:
        _cuda(event).inner.synchronize()

    def elapsed(self, start: Event, end: Event) -> float:
        start, end = _cuda(start), _cuda(end)
        if not (start.timing and end.timing):
            raise ValueError("elapsed needs two timing events")
        return start.inner.elapsed_time(end.inner) / 1000.0  # torch gives milliseconds

    # -- copies --------------------------------------------------------------------------------------------------------
    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        host = source if destination.is_cuda else destination
        # NOTE: with pageable memory the driver blocks the host until the bytes are staged, and says nothing about it.
        if host.numel() and not self._pinned.contains(host.data_ptr(), host.numel()) and not host.is_pinned():
            with self._lock:
                self.host_waits += 1
        with torch.no_grad(), without_dispatch_modes(), torch.cuda.stream(stream):
            destination.copy_(source, non_blocking=True)

    # -- device memory -------------------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> torch.Tensor:
        users = (self.onload_stream, self.offload_stream, self.current_stream())
        self._note_others()
        # A tensor born in inference mode could never be changed in place outside of it.
        with torch.inference_mode(False), without_dispatch_modes(), torch.cuda.stream(self._owner):
            block = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        # The memory may have been used by the owner's earlier work, which may still run.
        mine = torch.cuda.Event()
        mine.record(self._owner)
        for stream in users:
            stream.wait_event(mine)
        if nbytes:
            self._note_others(before=align(nbytes))
            with self._lock:
                self._blocks[block.data_ptr()] = nbytes
                self._allocated += align(nbytes)
                self._peak = max(self._peak, self._allocated)
        return block

    def share(self, block: torch.Tensor, stream: Stream) -> None:
        # The allocator then asks, when the last view is gone, how far that stream has got, and not only the owner.
        block.record_stream(stream)

    def free(self, block: torch.Tensor, after: tuple[Event, ...] = ()) -> None:
        if not block.numel():
            return
        self._note_others()
        with self._lock:
            if self._blocks.get(block.data_ptr()) != block.numel():
                raise ValueError("free of memory that is not a living block of this device (freed twice, or a part of one?)")
            self._allocated -= align(self._blocks.pop(block.data_ptr()))
        # The allocator hands the memory to the owner's later work only, and that now comes after every last use.
        for event in after:
            self._owner.wait_event(_cuda(event).inner)

    @property
    def allocated_bytes(self) -> int:
        return self._allocated

    @property
    def peak_allocated_bytes(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        with self._lock:
            self._peak = self._allocated

    def free_memory(self) -> int:
        free, _total = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + max(0, cached)

    def total_memory(self) -> int | None:
        return torch.cuda.mem_get_info(self.device)[1]

    def other_bytes(self) -> int:
        return max(0, torch.cuda.memory_allocated(self.device) - self._allocated)

    def activation_growth(self) -> int:
        return max(0, self._note_others() - (torch.cuda.memory_allocated(self.device) - self._allocated))

    def _note_others(self, before: int = 0) -> int:
        """The most that others than us were seen to hold, in bytes. torch's peak counter is of everything, and WebUI
        resets it now and then; so it is read whenever our own share is about to change (`before`: bytes of ours that are
        in torch's books already but not in ours), and counts when it moved since the last reading: our share then was
        what it is now. (A peak under an earlier, higher one of everything goes unseen.)"""
        peak = torch.cuda.max_memory_allocated(self.device)
        with self._lock:
            if peak != self._seen_peak:
                self._seen_peak = peak
                self._others_peak = max(self._others_peak, peak - self._allocated - before)
            return self._others_peak

    # -- host memory ---------------------------------------------------------------------------------------------------
    def pin(self, address: int, nbytes: int) -> bool:
        if address % mmap.PAGESIZE or nbytes <= 0:
            raise ValueError(f"cannot pin {nbytes} bytes at {address:#x}: whole pages only")
        with torch.cuda.device(self.device):
            error = int(self._cudart.cudaHostRegister(address, nbytes, _PORTABLE))
            if error == 0:
                self._pinned.add(address, nbytes)
                return True
            self._clear(f"cudaHostRegister refused {nbytes} bytes (error {error})")
            return False

    def unpin(self, address: int) -> None:
        self._pinned.remove(address)
        if sys is None or sys.is_finalizing():
            return  # the driver releases everything when the process ends, and may be gone already
        with torch.cuda.device(self.device):
            error = int(self._cudart.cudaHostUnregister(address))
            if error != 0:
                self._clear(f"cudaHostUnregister failed at {address:#x} (error {error})")

    def _clear(self, what: str) -> None:
        if self._errors.clear():
            logger.debug("%s; pending error cleared by %s", what, self._errors.mechanism)
        elif not self._told_uncleared:
            self._told_uncleared = True
            logger.warning(
                "%s, and the pending error could not be cleared (%s): the next CUDA operation may report it as its own",
                what,
                self._errors.mechanism or "no cudaGetLastError found",
            )

    # -- others on the same device ---------------------------------------------------------------------------------
    def aside(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(torch.cuda.Stream(self.device))

    def sibling(self) -> CudaStreams:
        other = CudaStreams(self.device, errors=self._errors)
        other._pinned = self._pinned
        return other

    # -- life ----------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        self.onload_stream.synchronize()
        self.offload_stream.synchronize()


def _cuda(event: Event) -> CudaEvent:
    if not isinstance(event, CudaEvent):
        raise TypeError(f"{type(event).__name__} is not an event of a CUDA device")
    return event
