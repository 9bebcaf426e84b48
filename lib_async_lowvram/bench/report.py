"""What the demo and the benchmark show: a table, a picture of where the time goes, and a trace to zoom into.

The picture (`draw_timelines`) has one panel per contender over the same time axis, with a lane each for copies to the
device, copies back, computing, and stalls. The trace (`write_trace`) is in the Chrome trace event format, which
ui.perfetto.dev and chrome://tracing open; one process per contender, one thread per lane.

Spans come from `core.stats.Trace`: seconds by `time.perf_counter`. Pure functions of them; matplotlib is imported when a
picture is drawn, with the Agg backend, so no display is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_async_lowvram.core.stats import Span

LANES = {
    "copy": ("copy to device", "#0072b2"),
    "write-back": ("copy back", "#56b4e9"),
    "compute": ("compute", "#009e73"),
    "stall": ("stall", "#d55e00"),
}
"""Lane of a span -> what it is called in pictures and traces, and its colour (of Okabe and Ito's palette, which colour-blind
people can tell apart). In the order in which lanes are shown."""

LEAST_STALL_SECONDS = 50e-6
"""A wait that finds its copy done takes some microseconds as well; it is no stall."""


@dataclass(frozen=True)
class Timeline:
    """Spans of one contender from `start` to `end`, by `time.perf_counter` seconds."""

    title: str
    start: float
    end: float
    spans: tuple[Span, ...]

    @classmethod
    def cut(cls, title: str, spans: Iterable[Span], start: float, end: float) -> Timeline:
        """The parts of `spans` that lie between `start` and `end`, without waits too short to be stalls."""
        inside = []
        for span in spans:
            first, last = max(span.start_seconds, start), min(span.end_seconds, end)
            if last <= first or (span.lane == "stall" and span.end_seconds - span.start_seconds < LEAST_STALL_SECONDS):
                continue
            inside.append(Span(span.lane, span.name, first, last, span.nbytes))
        return cls(title, start, end, tuple(sorted(inside, key=lambda span: (span.start_seconds, span.lane))))

    def with_resident_compute(self) -> Timeline:
        """Resident units fire no hooks, so nobody traced their computing: what lies between the other computing and the
        stalls is theirs, on a device whose compute stream is the calling thread."""
        spans, at = list(self.spans), self.start
        busy = sorted((span for span in self.spans if span.lane in ("compute", "stall")), key=lambda span: span.start_seconds)
        for span in [*busy, Span("compute", "", self.end, self.end)]:
            if span.start_seconds > at:
                spans.append(Span("compute", "resident layers", at, span.start_seconds))
            at = max(at, span.end_seconds)
        return Timeline(self.title, self.start, self.end, tuple(sorted(spans, key=lambda span: (span.start_seconds, span.lane))))

    def lane(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.lane == name]

    def busy_seconds(self, lane: str) -> float:
        return sum(span.end_seconds - span.start_seconds for span in self.lane(lane))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right, under a rule."""
    rows = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.0f} MB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def draw_timelines(path: Path, title: str, timelines: Sequence[Timeline]) -> None:
    """Write a PNG: one panel per timeline, all to the same scale. Raises OSError where `path` cannot be written."""
    # Not pyplot: it would keep figures and choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.1 + 2.2 * len(timelines)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    longest = max(timeline.end - timeline.start for timeline in timelines)
    for axis, timeline in zip(axes, timelines, strict=True):
        _draw_panel(axis, timeline)
        axis.set_xlim(0, longest * 1e3 * 1.01)
    axes[-1].set_xlabel("time since the pass started (ms)")
    figure.savefig(path)


def _draw_panel(axis: Any, timeline: Timeline) -> None:
    lanes = [lane for lane in LANES if lane in ("copy", "compute", "stall") or timeline.lane(lane)]
    for row, lane in enumerate(lanes):
        label, colour = LANES[lane]
        bars = [((s.start_seconds - timeline.start) * 1e3, (s.end_seconds - s.start_seconds) * 1e3) for s in timeline.lane(lane)]
        # A thin white edge keeps copies that follow each other apart.
        axis.broken_barh(bars, (row - 0.38, 0.76), facecolors=colour, edgecolors="white", linewidth=0.2 if "cop" in label else 0)
    for span in timeline.lane("stall"):
        # A stall also shows in the compute lane, where it is time lost.
        begin, length = (span.start_seconds - timeline.start) * 1e3, (span.end_seconds - span.start_seconds) * 1e3
        axis.axvspan(begin, begin + length, color=LANES["stall"][1], alpha=0.15, linewidth=0)
    length = timeline.end - timeline.start
    axis.axvline(length * 1e3, color="black", linewidth=1)
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    axis.set_yticks(range(len(lanes)))
    axis.set_yticklabels([f"{LANES[lane][0]}\n{milliseconds(timeline.busy_seconds(lane))}" for lane in lanes], fontsize=9)
    axis.set_title(f"{timeline.title}: {milliseconds(length)}", loc="left", fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def write_trace(path: Path, timelines: Sequence[Timeline]) -> None:
    """Write all timelines as one Chrome trace, each from time 0. Raises OSError where `path` cannot be written."""
    events: list[dict[str, Any]] = []
    for process, timeline in enumerate(timelines, start=1):
        events.append(_metadata("process_name", timeline.title, process))
        for thread, (lane, (label, _)) in enumerate(LANES.items(), start=1):
            events.append(_metadata("thread_name", label, process, thread))
            events.append({"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}})
            for span in timeline.lane(lane):
                events.append(
                    {
                        "ph": "X",
                        "name": span.name,
                        "cat": lane,
                        "pid": process,
                        "tid": thread,
                        "ts": round((span.start_seconds - timeline.start) * 1e6, 3),
                        "dur": round((span.end_seconds - span.start_seconds) * 1e6, 3),
                        "args": {"bytes": span.nbytes} if span.nbytes else {},
                    }
                )
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


def _metadata(kind: str, name: str, process: int, thread: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
