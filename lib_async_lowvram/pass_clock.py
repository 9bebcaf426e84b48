"""Measures streamed passes without making anybody wait: two timing events per pass, read when they are long done.

Called by `network` at a pass's start and end, under the mover's lock.
"""

from __future__ import annotations

import time
from collections import deque

from lib_async_lowvram.core.stats import Counters
from lib_async_lowvram.device.streams import Event, Streams


class PassClock:
    """Fills the per-pass figures of `Counters`. Seconds, bytes."""

    def __init__(self, streams: Streams, counters: Counters) -> None:
        self._streams = streams
        self._counters = counters
        self._open: deque[tuple[Event, Event]] = deque(maxlen=8)
        self._start: Event | None = None
        self._stall = 0.0
        self._waits = 0
        self._bytes = 0

    def begin(self) -> None:
        """The pass's first work is about to be enqueued."""
        streams = self._streams
        self._collect()
        self._counters.began = time.monotonic()
        self._start = streams.record(streams.current_stream(), timing=True)
        self._stall, self._waits, self._bytes = streams.stall_seconds, streams.host_waits, self._counters.streamed_bytes

    def end(self, complete: bool) -> None:
        """The pass's last work has been enqueued. Only complete passes count."""
        streams, counters = self._streams, self._counters
        if self._start is None:
            return
        counters.host_waits += streams.host_waits - self._waits
        stalled = streams.stall_seconds - self._stall
        counters.stall_seconds += stalled
        if complete:
            counters.passes += 1
            counters.stall_seconds_last_pass = stalled
            counters.streamed_bytes_last_pass = counters.streamed_bytes - self._bytes
            self._open.append((self._start, streams.record(streams.current_stream(), timing=True)))
            self._collect()
        self._start = None

    def _collect(self) -> None:
        while self._open and self._streams.done(self._open[0][1]):
            start, end = self._open.popleft()
            self._counters.recent_pass_seconds.append(self._streams.elapsed(start, end))
