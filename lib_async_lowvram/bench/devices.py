"""Devices as the demo and the benchmarks use them: one `Streams` per contender, and what the link really carries.

Problem: contenders must not see each other's memory counters, so each has a `Streams` of its own; on the simulated device that
means engines and memory of its own, over a link that is set. On a GPU the link is what it is, and is measured here, by copies
of this module's own: a judge must not rest on what it judges.

Called on the thread that runs the models.
"""

from __future__ import annotations

from contextlib import ExitStack
from statistics import median

from lib_async_lowvram.bench.options import BenchError
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.choose import open_streams
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Streams

LATENCY = 20e-6
"""Seconds per copy on the simulated link."""

SD15_WEIGHT_BYTES = 1_719_041_928
"""SD1.5's UNet in half precision, for which the mover's default of what a small unit is was chosen."""

LINK_BYTES, LINK_COPIES = 128 << 20, 9
"""One copy that measures the link, and how many."""


def small_unit_bytes(total_bytes: int) -> int:
    """What a small unit is in a model of `total_bytes`: the mover's default, scaled down with models narrower than SD1.5."""
    return max(1, min(OffloadConfig.small_leaf_bytes, OffloadConfig.small_leaf_bytes * total_bytes // SD15_WEIGHT_BYTES))


def is_simulated(streams: Streams) -> bool:
    return isinstance(streams, SimulatedStreams)


def open_for_contender(like: Streams, stack: ExitStack, capacity_bytes: int, bandwidth: float | None = None) -> Streams:
    """A `Streams` of the same device as `like`, closed by `stack`. On the simulated device with memory of `capacity_bytes` and a
    link of `bandwidth` bytes per second (None: as fast as memory); elsewhere both are what they are."""
    if is_simulated(like):
        streams: Streams = SimulatedStreams(capacity_bytes, bandwidth or float("inf"), LATENCY, busy=True)
    else:
        streams = open_streams(like.device)
    stack.callback(streams.close)
    return streams


def measure_link(streams: Streams, nbytes: int = LINK_BYTES) -> float:
    """Bytes per second of the onload stream, from pinned memory: the median of `LINK_COPIES` copies of `nbytes`, after one that
    is not counted. Raises `BenchError` where the system pins no memory: then nothing measured here would be comparable."""
    host = HostMemory(streams)
    block = host.allocate(nbytes)
    if not host.pin(block):
        raise BenchError(f"the system refused to pin {nbytes >> 20} MB: the link cannot be measured")
    memory = streams.allocate(nbytes)
    seconds = []
    for _ in range(1 + LINK_COPIES):
        start = streams.record(streams.onload_stream, timing=True)
        streams.copy(memory, block, streams.onload_stream)
        end = streams.record(streams.onload_stream, timing=True)
        streams.synchronize(end)
        seconds.append(streams.elapsed(start, end))
    streams.free(memory, (streams.record(streams.current_stream()),))
    return nbytes / median(seconds[1:])
