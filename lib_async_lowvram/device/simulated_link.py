"""The link of the simulated device: its two copy engines, and what copies cost on them.

Problem: tests change what a link is in the middle of a story - slower, jittery, failing, held - and what has not begun yet must follow.

Threads: any, for everything here; the engines' own are `copy_engine`'s.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from .copy_engine import CopyEngine, CopyHold, Link
from .streams import Stream


class SimulatedLink:
    """A part of `SimulatedStreams`. All of `bandwidth`, `offload_bandwidth` (bytes/s), `latency`, `jitter_seconds` (s), `fail_copy`,
    `on_copy` (see `Link`) may be changed at any time; copies that have not begun yet follow."""

    onload_stream: CopyEngine
    offload_stream: CopyEngine

    def _open_link(self, link: Link, offload_bandwidth: float | None, seed: int, busy: bool) -> None:
        """`offload_bandwidth`: None as long as it is to follow the other direction's."""
        self.onload_stream = CopyEngine("onload", link, seed, busy)
        self.offload_stream = CopyEngine("offload", replace(link), seed)
        self._engines = (self.onload_stream, self.offload_stream)
        self._offload_follows = offload_bandwidth is None
        if offload_bandwidth is not None:
            self.offload_bandwidth = offload_bandwidth
        # Collected without `close`: the threads end by themselves. At interpreter exit they die as daemons.
        weakref.finalize(self, _stop, self._engines).atexit = False

    @property
    def bandwidth(self) -> float:
        """Bytes per second, of both directions unless `offload_bandwidth` was set."""
        return self.onload_stream.link.bandwidth

    @bandwidth.setter
    def bandwidth(self, value: float) -> None:
        self.onload_stream.link.bandwidth = positive(value)
        if self._offload_follows:
            self.offload_stream.link.bandwidth = positive(value)

    @property
    def offload_bandwidth(self) -> float:
        return self.offload_stream.link.bandwidth

    @offload_bandwidth.setter
    def offload_bandwidth(self, value: float) -> None:
        self._offload_follows = False
        self.offload_stream.link.bandwidth = positive(value)

    latency = property(lambda self: self._engines[0].link.latency, lambda self, value: self._set("latency", value))
    jitter_seconds = property(
        lambda self: self._engines[0].link.jitter_seconds, lambda self, value: self._set("jitter_seconds", value)
    )
    fail_copy = property(lambda self: self._engines[0].link.fail_copy, lambda self, value: self._set("fail_copy", value))
    on_copy = property(lambda self: self._engines[0].link.on_copy, lambda self, value: self._set("on_copy", value))

    def _set(self, name: str, value: object) -> None:
        for engine in self._engines:
            setattr(engine.link, name, value)

    @contextmanager
    def hold_copies(self, lane: Literal["onload", "offload"] | None = None) -> Iterator[CopyHold]:
        """Inside, no further copy of `lane` (None: of either) starts, nor does anything enqueued behind it happen,
        except copies let through by `.let_pass(n)`: for tests that need an order instead of a sleep."""
        held = tuple(engine for engine in self._engines if lane in (None, engine.lane))
        for engine in held:
            engine.hold()
        try:
            yield CopyHold(held)
        finally:
            for engine in held:
                engine.release()

    def close(self) -> None:
        """Finish what was enqueued and end the threads. Idempotent."""
        _stop(self._engines)
        for engine in self._engines:
            engine.join()

    def _engine(self, stream: Stream) -> CopyEngine:
        if stream not in self._engines:
            raise ValueError(f"{stream!r} is not a copy stream of this device")
        return stream


def _stop(engines: tuple[CopyEngine, ...]) -> None:
    for engine in engines:
        engine.stop()


def positive(bandwidth: float) -> float:
    """`bandwidth`, bytes per second. Raises `ValueError` where it is not above zero."""
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above zero bytes/s, not {bandwidth}")
    return math.inf if bandwidth == math.inf else float(bandwidth)
