"""Counters of one network, and an optional trace of what its streams did.

Plain numbers that hooks can bump without a lock of their own (the mover's is held). Seconds, bytes. Pure; no torch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

COUNTED = (
    *("passes", "learning_passes", "hits", "misses", "refetches", "write_backs", "adopted", "skipped", "relearned", "replanned", "sheds"),
    *("host_waits", "write_back_waits", "staging_waits", "staged_bytes", "streamed_bytes", "fetched_ahead_bytes", "adopted_ahead_bytes"),
)
"""The counters that only grow."""


@dataclass
class Counters:
    """Since the network was attached, unless said otherwise.

    Attributes:
        passes: streamed passes completed; learning_passes: passes that moved whole regions.
        hits: acquires whose onload had been issued ahead; misses: acquires that had to issue it themselves.
        refetches: onloads repeated because the master changed after the prefetch; write_backs: changed units copied to
            their masters; adopted: units whose parameters were replaced by somebody and packed anew.
        skipped: firings out of the learned order; relearned: times the order was replaced; replanned: times that another plan
            was taken up between two passes in use. sheds: times that residents were given up because memory ran out in a pass.
        host_waits: host waits during streamed passes (I3: 0 with pinned masters). write_back_waits: passes at whose end the
            host waited for what had been changed and written back in them; not among the former.
        staging_waits: acquires that waited on the host for a copy through the staging ring to be enqueued (not among host_waits);
            staged_bytes: that went through it, of streamed_bytes.
        fetched_ahead_bytes: of streamed_bytes, those enqueued while another network was in use; adopted_ahead_bytes: of these, what was
            there, and true, when the network was entered.
        streamed_bytes_last_pass, stall_seconds_last_pass: of the last complete streamed pass.
        began: when the newest streamed pass did, by `time.monotonic`; 0.0 before the first.
    """

    passes: int = 0
    learning_passes: int = 0
    hits: int = 0
    misses: int = 0
    refetches: int = 0
    write_backs: int = 0
    adopted: int = 0
    skipped: int = 0
    relearned: int = 0
    replanned: int = 0
    sheds: int = 0
    host_waits: int = 0
    write_back_waits: int = 0
    staging_waits: int = 0
    staged_bytes: int = 0
    streamed_bytes: int = 0
    fetched_ahead_bytes: int = 0
    adopted_ahead_bytes: int = 0
    streamed_bytes_last_pass: int = 0
    stall_seconds: float = 0.0
    stall_seconds_last_pass: float = 0.0
    began: float = 0.0
    recent_pass_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=32))

    @property
    def pass_seconds(self) -> float:
        """Median of the recent passes; 0.0 before the first."""
        return median(self.recent_pass_seconds) if self.recent_pass_seconds else 0.0

    def include(self, other: Counters) -> None:
        """Add what `other` has counted; what is about one pass only stays as it is."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Span:
    """Something that took time on one lane: seconds by `time.perf_counter`, bytes where it moved any."""

    lane: str
    name: str
    start_seconds: float
    end_seconds: float
    nbytes: int = 0


@dataclass
class Trace:
    """Spans in the order in which they ended. Lanes: "compute", "stall", "copy", "write-back"."""

    spans: list[Span] = field(default_factory=list)

    def add(self, lane: str, name: str, start_seconds: float, end_seconds: float, nbytes: int = 0) -> None:
        """Append one span. `list.append` is atomic, so copy threads may call this beside the sampling thread."""
        self.spans.append(Span(lane, name, start_seconds, end_seconds, nbytes))
