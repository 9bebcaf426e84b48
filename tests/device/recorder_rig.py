"""A device under the ordering judge, and the steps of a mover, by hand."""

from __future__ import annotations

import math

import pytest

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.recorder import OrderingViolation, RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams

N = 1024


class Bench:
    """One device, two masters, one slot, and the steps of a mover, by hand."""

    def __init__(self) -> None:
        self.streams = RecordingStreams(SimulatedStreams(bandwidth=math.inf, latency=0.0))
        self.memory = HostMemory(self.streams)
        self.master, self.other_master = self.memory.allocate(N), self.memory.allocate(N)
        self.memory.pin(self.master)
        self.memory.pin(self.other_master)
        self.slot = self.streams.allocate(N)
        self.up, self.down = self.streams.onload_stream, self.streams.offload_stream

    def onload(self, master=None, slot=None):
        self.streams.copy(self.slot if slot is None else slot, self.master if master is None else master, self.up)
        return self.streams.record(self.up)

    def write_back(self, after=None, slot=None):
        if after is not None:
            self.streams.wait(self.down, after)
        self.streams.copy(self.master, self.slot if slot is None else slot, self.down)
        return self.streams.record(self.down)

    def compute(self, after=None, writes=False, slot=None):
        stream = self.streams.current_stream()
        if after is not None:
            self.streams.wait(stream, after)
        slot = self.slot if slot is None else slot
        self.streams.use(reads=() if writes else (slot,), writes=(slot,) if writes else (), what="layer")
        return self.streams.record(stream)

    def verdict(self):
        self.streams.inner.close()
        self.streams.check()

    def wrong(self, *stories):
        self.streams.inner.close()
        with pytest.raises(OrderingViolation) as raised:
            self.streams.check()
        for story in stories:
            assert story in str(raised.value)
