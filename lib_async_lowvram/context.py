"""What the networks of one mover share: the device, host memory, configuration, the lock, the judges.

One lock for everything the mover does: hooks hold it for microseconds at leaf boundaries, other threads (an API call that
drains) for as long as they need; whoever comes from another thread therefore acts at a leaf boundary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from lib_async_lowvram.activations import Activations, Key
from lib_async_lowvram.ahead import Ahead
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.core.stats import Counters, Trace
from lib_async_lowvram.device.address_ranges import HostRanges
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.placement import PlacementChecker
from lib_async_lowvram.device.staging import Stager
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.measured import Measured
from lib_async_lowvram.peaks import Peaks
from lib_async_lowvram.pinning import Pinning
from lib_async_lowvram.timeline import Timeline

STEP = 32 << 20
"""Bytes. The automatic budget is rounded down to it, so that a few bytes more or less do not make another plan."""


@dataclass
class Context:
    """Shared by a mover and its networks; `config` may be replaced between passes.

    Attributes:
        checker, host_ranges: the placement judge and what it guards; None unless the config asks for it.
        shares_masters: another mover's masters are used where modules lie over them.
        measured, activations: what passes on this device have shown: times, and memory beside the weights.
        keep_free: (network, shapes of the arguments, bytes free without any weights) -> bytes that the automatic budget leaves
            free, for hosts whose results depend on that.
        trace: where spans of computing and stalls go; None = nowhere.
        turn: of the lock; notified when a pass ends.
        timeline: the newest pass that was timed, for people.
        stager, pinning: how masters travel that are not pinned, and which are.
        ahead: what is fetched for the network that comes next.
        gone: what networks had counted that are attached no longer (models that were thrown away).
    """

    streams: Streams
    host: HostMemory
    config: OffloadConfig
    checker: PlacementChecker | None = None
    host_ranges: HostRanges | None = None
    trace: Trace | None = None
    shares_masters: bool = False
    gone: Counters = field(default_factory=Counters)
    ahead: Ahead = field(default_factory=Ahead)
    measured: Measured = field(default_factory=Measured)
    activations: Activations = field(default_factory=Activations)
    keep_free: Callable[[str, tuple | None, int], int] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    peaks: Peaks = field(init=False)
    turn: threading.Condition = field(init=False)
    stager: Stager = field(init=False)
    timeline: Timeline = field(init=False)
    pinning: Pinning = field(init=False)

    def __post_init__(self) -> None:
        self.peaks = Peaks(self.streams)
        self.turn = threading.Condition(self.lock)
        self.stager = Stager(self.streams, self.host)
        self.timeline = Timeline(self.streams)
        self.pinning = Pinning(self.host, self.stager, owns=not self.shares_masters)

    def note_activations(self, key: Key) -> None:
        """A pass of this kind is over."""
        if not self.activations.knows(key):
            self.activations.passed(key, self.streams.activation_growth())

    def budget(self, key: Key = ("", None)) -> int:
        """Weight bytes allowed on the device now, for passes of this kind. Automatic: what is free (or ours already), less what
        such passes need beside the weights, less the reserve (half of it where that need is known, not guessed); and never so
        much that less than `keep_free` bytes stay free."""
        config, streams = self.config, self.streams
        if config.budget_bytes:
            return max(0, config.budget_bytes - config.preview_bytes)
        room = streams.free_memory() + streams.allocated_bytes - config.preview_bytes
        reserve = config.reserve_bytes // 2 if self.activations.knows(key) else config.reserve_bytes
        budget = room - self.activations.expected(key, streams.activation_growth()) - reserve
        if self.keep_free is not None:
            budget = min(budget, room - self.keep_free(*key, room))
        return max(0, budget // STEP * STEP)
