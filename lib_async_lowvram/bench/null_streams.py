"""A device on which nothing takes any time, because nothing happens: for the host's own cost of moving weights.

Its memory is the host's, its copies are none, its events are all one and long done. What a pass over modules that compute
nothing takes on it is what hooks, order, ring and bookkeeping cost in Python. Any thread; no state but the counters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lib_async_lowvram.device.streams import Event, Stream, Streams


class NullStreams(Streams):
    """See the module."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = "nothing"
        self.onload_stream, self.offload_stream, self._compute = object(), object(), object()
        self.host_waits = 0
        self._event, self._copied = Event(), Event()
        self._allocated = self._peak = 0

    def current_stream(self) -> Stream:
        return self._compute

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        return self._copied if stream is self.onload_stream else self._event

    def wait(self, stream: Stream, event: Event) -> None:
        pass

    def done(self, event: Event) -> bool:
        return True

    def synchronize(self, event: Event) -> None:
        pass

    def elapsed(self, start: Event, end: Event) -> float:
        # Copies take some time, for there must be a bandwidth; nobody ever waits for one, else the mover would give way to stock.
        return 1e-6 if end is self._copied else 0.0

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        pass

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._allocated += nbytes
        self._peak = max(self._peak, self._allocated)
        return torch.empty(nbytes, dtype=torch.uint8)

    def share(self, block: torch.Tensor, stream: Stream) -> None:
        pass

    def free(self, block: torch.Tensor, after: tuple[Event, ...] = ()) -> None:
        self._allocated -= block.numel()

    @property
    def allocated_bytes(self) -> int:
        return self._allocated

    @property
    def peak_allocated_bytes(self) -> int:
        return self._peak

    def reset_peak(self) -> None:
        self._peak = self._allocated

    def free_memory(self) -> int:
        return 1 << 40

    def pin(self, address: int, nbytes: int) -> bool:
        return True

    def unpin(self, address: int) -> None:
        pass

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def sibling(self) -> NullStreams:
        return NullStreams()

    def close(self) -> None:
        pass
