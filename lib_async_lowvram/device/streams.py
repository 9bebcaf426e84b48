"""What the mover needs of a device, and nothing more.

Problem: the mover must overlap copies with computing on hardware that most machines running its tests do not have. So
everything above this file talks to a `Streams`: streams named by role, events, copies both ways, device memory, pinning.
`device/cuda.py` implements it for CUDA and ROCm, `device/simulated.py` for a machine without a GPU, `device/recorder.py`
wraps either and judges the ordering.

Invariants carried here:
- I3: `synchronize` is the only call that blocks the *host* until a copy is done; it is counted. `wait` blocks a stream.
- I8 record before wait: an `Event` is only ever made by `record`, so a wait on an event nobody recorded cannot be written.
- Nothing here is made at import (I7); a `Streams` makes its streams and threads when it is constructed and gives them
  back in `close`.

Threads: every method may be called from any thread. `current_stream` answers for the calling thread.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

ALIGNMENT = 512
"""Bytes. Every tensor on the device starts at a multiple of this, as from torch's caching allocator: libraries choose
algorithms by address, so a looser alignment could change pixels (I1)."""

Stream = Any
"""A stream handle. Opaque: only the `Streams` that made it looks inside."""


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """The smallest multiple of `to` that is at least `nbytes` (bytes)."""
    return -(-nbytes // to) * to


class Event:
    """A point in one stream's work, made by `Streams.record` and immutable from then on."""

    __slots__ = ()


class Streams(ABC):
    """Streams, events, memory and copies of one device.

    Attributes:
        device: what tensors must be moved to (`torch.device`, with its index where it has one).
        name: for people: "cuda:0 NVIDIA GeForce RTX 3060", "simulated".
        onload_stream: the copy stream that carries host -> device copies, in the order they were enqueued.
        offload_stream: the copy stream that carries device -> host copies (write-backs).
        stall_seconds: seconds compute streams spent blocked in `wait` since construction, where the device can tell
            without a host wait (`knows_stalls`), else 0.0.
        host_waits: how often `synchronize` (or a copy from pageable memory) blocked a calling host thread.
    """

    device: torch.device
    name: str
    onload_stream: Stream
    offload_stream: Stream
    knows_stalls: bool = False
    stall_seconds: float = 0.0
    host_waits: int = 0

    # -- streams and events ------------------------------------------------------------------------------------------
    @abstractmethod
    def current_stream(self) -> Stream:
        """The stream on which the *calling thread* would launch work on this device now. Ask at every acquire: each
        thread, and each request, may have its own."""

    @abstractmethod
    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        """A new event at the end of all work enqueued on `stream` so far. `timing` makes `elapsed` possible."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """Work enqueued on `stream` from now on starts after `event`. Does not block the host, except on a device
        whose compute stream *is* the calling thread (the simulated one), where the time counts as stall."""

    @abstractmethod
    def done(self, event: Event) -> bool:
        """Whether `event` has been reached. Never blocks."""

    @abstractmethod
    def synchronize(self, event: Event) -> None:
        """Block the calling host thread until `event`. Counted in `host_waits`; raises what the copy raised."""

    def failed(self, event: Event) -> bool:
        """Whether `event` is known to come behind a copy that failed, and did not happen. False where a failed copy leaves a device that
        does nothing any more (CUDA)."""
        return False

    def outwait(self, event: Event) -> None:
        """Block the calling thread, whose business is waiting, until `event`: not counted, and whatever failed before it is left
        to be told to somebody else."""
        self.synchronize(event)

    @abstractmethod
    def elapsed(self, start: Event, end: Event) -> float:
        """Seconds between two timing events that are both done."""

    def known(self) -> Any:
        """What the calling thread knows to be done, for another one's `learn`. Only a judge of orderings keeps account of it."""
        return None

    def learn(self, known: Any) -> None:
        """The calling thread goes on behind one that knew this: it was told through a queue, say."""
        return None

    # -- copies --------------------------------------------------------------------------------------------------------
    @abstractmethod
    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Enqueue a copy of `source` into `destination` on `stream` (`onload_stream` or `offload_stream`). Both are
        one-dimensional uint8 tensors of equal length, one of them in host memory. Asynchronous when the host side is
        pinned; otherwise it may block the host, and is then counted in `host_waits`. Both tensors' memory is kept
        alive by the caller until an event recorded after the copy is done."""

    def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between two one-dimensional uint8 host tensors of equal length, now, on the calling thread. Others run meanwhile:
        it holds no interpreter lock, starts no threads, and no dispatch mode sees it."""
        if destination.numel() != source.numel():
            raise ValueError(f"copy of {source.numel()} bytes into {destination.numel()}")
        ctypes.memmove(destination.data_ptr(), source.data_ptr(), source.numel())

    def read_on_host(self, destination: torch.Tensor, read: Callable[[torch.Tensor], None]) -> None:
        """`read` fills `destination` (uint8, in host memory) now, on the calling thread, from somewhere that is no tensor."""
        read(destination)

    def discard(self, memory: torch.Tensor, after: Event) -> Event:
        """The contents of `memory` (uint8, on the device) are no longer wanted once `after` has been reached. Returns
        the event that whoever writes there next must wait for. A device that poisons freed memory does it here."""
        return after

    # -- device memory -------------------------------------------------------------------------------------------------
    @abstractmethod
    def allocate(self, nbytes: int) -> torch.Tensor:
        """A block of device memory: one-dimensional uint8, `nbytes` long, aligned to `ALIGNMENT`, contents undefined.
        Raises `torch.cuda.OutOfMemoryError` when there is no room. Blocks are owned by the caller until `free`. It may be
        used at once on both copy streams and the caller's current stream; elsewhere after waiting for one of these."""

    @abstractmethod
    def share(self, block: torch.Tensor, stream: Stream) -> None:
        """Others may keep views of this `allocate`d block beyond `free`, as autograd does until its graph is gone, and read
        them on `stream`. From now on nothing but copies changes its bytes: not `discard`, and not `free`, after which it lives
        as long as its last view, as any tensor does."""

    @abstractmethod
    def free(self, block: torch.Tensor, after: tuple[Event, ...] = ()) -> None:
        """Give back a block from `allocate`. `after`: events of all its last uses, the current stream's too; the memory is
        not handed to anybody else before them. The caller drops its own references."""

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Bytes now held by `allocate`d blocks of this `Streams`."""

    @property
    @abstractmethod
    def peak_allocated_bytes(self) -> int:
        """The largest `allocated_bytes` since construction or `reset_peak`."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Start the peak anew from the present `allocated_bytes`."""

    @abstractmethod
    def free_memory(self) -> int:
        """Bytes that could still be allocated on the device now, by anybody, caches included where they can be reused
        by this process."""

    def total_memory(self) -> int | None:
        """Bytes of device memory there are; None where nobody knows."""
        return None

    def other_bytes(self) -> int:
        """Bytes that this process holds on the device beside `allocate`d blocks, now. 0 where nobody counts them."""
        return 0

    def activation_growth(self) -> int:
        """Bytes by which this process's other allocations on the device have exceeded their present size so far: what
        computing is known to need beside the weights. 0 where nobody counts them."""
        return 0

    # -- host memory ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def pin(self, address: int, nbytes: int) -> bool:
        """Page-lock host memory [address, address + nbytes) for this device. False when refused; a pending device
        error is cleared then. Page-aligned addresses only."""

    @abstractmethod
    def unpin(self, address: int) -> None:
        """Undo `pin`. The caller has made sure that no copy still reads or writes there. Safe at interpreter exit."""

    # -- others on the same device ---------------------------------------------------------------------------------
    @abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """Work that the calling thread launches inside goes to a compute stream of its own."""

    @abstractmethod
    def sibling(self) -> Streams:
        """Another `Streams` for the same device, memory and pinned ranges, with copy streams and counters of its own; its
        events may be waited for here, and the other way round. The caller closes it."""

    # -- life ----------------------------------------------------------------------------------------------------------
    @abstractmethod
    def close(self) -> None:
        """Wait for everything in flight and stop threads. Idempotent; the object is unusable afterwards."""
