"""Where the time of one pass went, leaf by leaf, for people to look at: the newest pass that carried timing events.

Problem: a picture of copies beside computing says more than any figure, but steady passes carry no timing events. So the passes that
are timed anyway (`streaming.SAMPLED`) are kept here, newest only, and whoever looks asks for the next one to be timed, too.

All times are the device's own, by its events; nobody waits for them: what has not got there yet is told the next time.
`passed` and `due` are called by `streaming`, the rest from any thread, all of them under the mover's lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from lib_async_lowvram.device.streams import Event, Streams
from lib_async_lowvram.leaf_clock import LeafClock

LEAST_STALL_SECONDS = 5e-6
"""Between two events with nothing to wait for in between: what recording them takes, not a stall."""

Timed = tuple[LeafClock, str, tuple[str, ...], float]
"""(clock, network, names of its units, when the pass ended by `time.monotonic`)"""


class Timeline:
    """See the module.

    Attributes:
        wanted: the next pass is to be timed.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._newest: Timed | None = None
        self._read: tuple[Timed, list[dict[str, Any]], float] | None = None  # the last one that was done: its spans, its seconds
        self.wanted = False

    def due(self) -> bool:
        """Whether somebody wants the pass that starts now to be timed; asked once."""
        wanted, self.wanted = self.wanted, False
        return wanted

    def passed(self, clock: LeafClock, network: str, names: Sequence[str]) -> None:
        """A complete pass was timed. `names`: of the network's units, by index."""
        self._take_up()
        self._newest = clock, network, tuple(names), time.monotonic()

    def _take_up(self) -> None:
        """Read the newest pass if the device is done with it."""
        if self._newest is None or (self._read is not None and self._read[0] is self._newest):
            return
        clock, _, names, _ = self._newest
        figures = clock.timeline()
        if figures is not None:
            seconds, waits, computes, copies = figures
            spans = [_span("stall", names[unit], start, end) for unit, start, end in waits if end - start >= LEAST_STALL_SECONDS]
            spans += [_span("compute", names[unit], start, end) for unit, start, end in computes]
            spans += [_span("copy", names[unit], start, end, nbytes) for unit, nbytes, start, end in copies]
            self._read = self._newest, spans, seconds

    def worst_stall(self) -> dict[str, Any] | None:
        """The unit for whose copy the pass waited longest: {"unit", "seconds"}; None when it waited for none, or none was timed."""
        self._take_up()
        stalls = [span for span in self._read[1] if span["lane"] == "stall"] if self._read is not None else []
        worst = max(stalls, key=lambda span: span["end"] - span["start"], default=None)
        return worst and {"unit": f"{self._read[0][1]}.{worst['name']}", "seconds": worst["end"] - worst["start"]}

    def describe(self, previews: Iterable[tuple[Event, Event]] = ()) -> dict[str, Any]:
        """{"network", "seconds", "age_seconds", "spans": [{"lane", "name", "start", "end", "bytes"}]}: seconds from the pass's start,
        bytes. Lanes: "compute" (a unit and all that ran until the next one), "stall" (computing waits for the unit's copy), "copy"
        (issued in that pass: the last ones are the next pass's, and may end after its own end), "preview". `previews`: (start, end) of
        frames, timing events of this device; those that overlap the pass are told."""
        self._take_up()
        if self._read is None:
            return {"network": None, "seconds": 0.0, "age_seconds": None, "spans": []}
        (clock, network, _, ended), spans, seconds = self._read
        found = list(spans)
        for start, end in previews:
            if self._streams.done(end):
                begin, finish = clock.since_start(start), clock.since_start(end)
                if finish > 0 and begin < seconds:
                    found.append(_span("preview", "preview", begin, finish))
        return {"network": network, "seconds": seconds, "age_seconds": time.monotonic() - ended, "spans": found}


def _span(lane: str, name: str, start: float, end: float, nbytes: int = 0) -> dict[str, Any]:
    return {"lane": lane, "name": name, "start": start, "end": end, "bytes": nbytes}
