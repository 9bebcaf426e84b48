"""Where the time of one pass went, leaf by leaf, for people to look at: the newest one that carried timing events.

Problem: a picture of copies beside computing says more than any figure, but steady passes carry no timing events. So the passes that
are timed anyway (`streaming.SAMPLED`) are kept here, each network's newest, and whoever looks asks for the next one to be timed, too.

All times are the device's own, by its events; nobody waits for them: what has not got there yet is told the next time.
`passed` and `due` are called by `streaming`, the rest from any thread, all of them under the mover's lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from lib_async_lowvram.device.streams import Event, Streams
from lib_async_lowvram.leaf_clock import LeafClock

LEAST_STALL_SECONDS = 1e-4
"""Shorter ones cannot be seen, and may be no more than what recording two events takes."""

Timed = tuple[LeafClock, tuple[str, ...], float]
"""(clock, names of its units, when the pass ended by `time.monotonic`)"""

Read = tuple[Timed, list[dict[str, Any]], float]
"""(what was read, its spans, its seconds)"""


class Timeline:
    """See the module."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._newest: dict[str, Timed] = {}  # of each network
        self._read: dict[str, Read] = {}  # the last one of each that was done
        self._asked = 0
        self._served: dict[str, int] = {}

    def ask(self) -> None:
        """Somebody looks: each network's next pass is to be timed."""
        self._asked += 1

    def due(self, network: str) -> bool:
        """Whether the pass of this network that starts now is to be timed for somebody who looks."""
        due = self._served.get(network, 0) != self._asked
        self._served[network] = self._asked
        return due

    def passed(self, clock: LeafClock, network: str, names: Sequence[str]) -> None:
        """A complete pass was timed. `names`: of the network's units, by index."""
        self._take_up(network)
        self._newest[network] = clock, tuple(names), time.monotonic()

    def forget(self, network: str) -> None:
        """The network is gone."""
        for each in (self._newest, self._read, self._served):
            each.pop(network, None)

    def _take_up(self, network: str) -> Read | None:
        """Read the newest pass if the device is done with it; what was read last."""
        newest, read = self._newest.get(network), self._read.get(network)
        if newest is None or (read is not None and read[0] is newest):
            return read
        clock, names, _ = newest
        figures = clock.timeline()
        if figures is not None:
            seconds, waits, computes, copies = figures
            spans = [_span("stall", names[unit], start, end) for unit, start, end in waits if end - start >= LEAST_STALL_SECONDS]
            spans += [_span("compute", names[unit], start, end) for unit, start, end in computes]
            spans += [_span("copy", names[unit], start, end, nbytes) for unit, nbytes, start, end in copies]
            self._read[network] = newest, spans, seconds
        return self._read.get(network)

    def worst_stall(self, network: str | None) -> dict[str, Any] | None:
        """The unit for whose copy a pass of the network waited longest: {"unit", "seconds"}; None when it waited for none, or none was
        timed."""
        read = self._take_up(network) if network is not None else None
        stalls = [span for span in read[1] if span["lane"] == "stall"] if read is not None else []
        worst = max(stalls, key=lambda span: span["end"] - span["start"], default=None)
        return worst and {"unit": f"{network}.{worst['name']}", "seconds": worst["end"] - worst["start"]}

    def describe(self, network: str | None, previews: Iterable[tuple[Event, Event]] = ()) -> dict[str, Any]:
        """{"network", "seconds", "age_seconds", "spans": [{"lane", "name", "start", "end", "bytes"}]}: seconds from the pass's start,
        bytes. Lanes: "compute" (a unit and all that ran until the next one), "stall" (computing waits for the unit's copy), "copy"
        (issued in that pass: the last ones are the next pass's, and may end after its own end), "preview". `previews`: (start, end) of
        frames, timing events of this device; those that overlap the pass are told."""
        read = self._take_up(network) if network is not None else None
        if read is None:
            return {"network": None, "seconds": 0.0, "age_seconds": None, "spans": []}
        (clock, _, ended), spans, seconds = read
        found = list(spans)
        for start, end in previews:
            if self._streams.done(end):
                begin, finish = clock.since_start(start), clock.since_start(end)
                if finish > 0 and begin < seconds:
                    found.append(_span("preview", "preview", begin, finish))
        return {"network": network, "seconds": seconds, "age_seconds": time.monotonic() - ended, "spans": found}


def _span(lane: str, name: str, start: float, end: float, nbytes: int = 0) -> dict[str, Any]:
    return {"lane": lane, "name": name, "start": start, "end": end, "bytes": nbytes}
