"""The simulated device: real concurrency, a link's timing, a hard cap, poison, pinning and errors."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from tests.device.simulated_rig import host_block, poisoned


# -- copies and events -------------------------------------------------------------------------------------------------
def test_copies_move_bytes_both_ways_without_a_host_wait(streams):
    memory = HostMemory(streams)
    source, target = host_block(memory, [1, 2, 3]), host_block(memory, [0, 0, 0])
    block = streams.allocate(3)
    streams.copy(block, source, streams.onload_stream)
    streams.wait(streams.offload_stream, streams.record(streams.onload_stream))
    streams.copy(target, block, streams.offload_stream)
    streams.wait(streams.current_stream(), streams.record(streams.offload_stream))
    assert target.tolist() == [1, 2, 3]
    assert streams.host_waits == 0


def test_no_thread_before_the_first_copy_and_none_after_close():
    before = set(threading.enumerate())
    streams = SimulatedStreams()
    streams.record(streams.current_stream())
    assert set(threading.enumerate()) == before
    streams.synchronize(streams.record(streams.onload_stream))
    started = set(threading.enumerate()) - before
    assert {thread.daemon for thread in started} == {True}
    streams.close()
    streams.close()
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(RuntimeError, match="closed"):
        streams.record(streams.onload_stream)


def test_a_collected_device_ends_its_threads():
    streams = SimulatedStreams()
    streams.synchronize(streams.record(streams.onload_stream))
    thread = streams.onload_stream._thread
    gone = weakref.ref(streams)
    del streams
    gc.collect()
    assert gone() is None
    thread.join()


def test_events_of_a_held_engine_are_not_reached_until_it_is_released(streams):
    memory = HostMemory(streams)
    source, block = host_block(memory, [7]), streams.allocate(1)
    with streams.hold_copies("onload") as hold:
        before = streams.record(streams.onload_stream)
        streams.copy(block, source, streams.onload_stream)
        first = streams.record(streams.onload_stream)
        streams.copy(block, source, streams.onload_stream)
        second = streams.record(streams.onload_stream)
        streams.synchronize(before)
        assert not streams.done(first) and poisoned(block)
        hold.let_pass()
        streams.synchronize(first)
        assert block.tolist() == [7] and not streams.done(second)
        # The other engine is free.
        streams.synchronize(streams.record(streams.offload_stream))
    streams.synchronize(second)


def test_close_finishes_what_is_held_and_what_waits_for_the_other_engine(streams):
    memory = HostMemory(streams)
    source, target, block = host_block(memory, [7]), host_block(memory, [0]), streams.allocate(1)
    with streams.hold_copies():
        streams.copy(block, source, streams.onload_stream)
        streams.wait(streams.offload_stream, streams.record(streams.onload_stream))
        streams.copy(target, block, streams.offload_stream)
        streams.wait(streams.onload_stream, streams.record(streams.offload_stream))
        last = streams.record(streams.onload_stream)
        streams.close()
        assert streams.done(last) and target.tolist() == [7]


def test_a_wait_on_a_copy_stream_returns_at_once_and_orders_the_engines(streams):
    memory = HostMemory(streams)
    source, target, block = host_block(memory, [7]), host_block(memory, [0]), streams.allocate(1)
    with streams.hold_copies("onload"):
        streams.copy(block, source, streams.onload_stream)
        streams.wait(streams.offload_stream, streams.record(streams.onload_stream))
        streams.copy(target, block, streams.offload_stream)
        written = streams.record(streams.offload_stream)
        assert not streams.done(written) and target.tolist() == [0]
    streams.synchronize(written)
    assert target.tolist() == [7]


def test_a_wait_on_the_compute_stream_is_a_stall_and_no_host_wait(streams):
    memory = HostMemory(streams)
    source, block = host_block(memory, [7]), streams.allocate(1)
    streams.bandwidth = 100.0  # 10 ms for the byte
    streams.copy(block, source, streams.onload_stream)
    copied = streams.record(streams.onload_stream)
    streams.wait(streams.current_stream(), copied)
    stall = streams.stall_seconds
    assert block.tolist() == [7] and stall > 0 and streams.host_waits == 0
    streams.wait(streams.current_stream(), copied)
    assert streams.stall_seconds == stall


def test_the_compute_stream_belongs_to_the_calling_thread(streams):
    other = []
    thread = threading.Thread(target=lambda: other.append(streams.current_stream()))
    thread.start()
    thread.join()
    assert streams.current_stream() is streams.current_stream() is not other[0]
    assert streams.done(streams.record(other[0]))
    with pytest.raises(ValueError, match="another thread"):
        streams.wait(other[0], streams.record(streams.onload_stream))


@given(st.lists(st.integers(1, 1 << 16), min_size=1, max_size=6), st.sampled_from([1e6, 1e7, 1e8]), st.sampled_from([0.0, 1e-3]))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("busy", [False, True])
def test_a_burst_takes_exactly_what_the_link_clock_says(busy, sizes, bandwidth, latency):
    spans = []
    streams = SimulatedStreams(bandwidth=bandwidth, latency=latency, on_copy=lambda *span: spans.append(span), busy=busy)
    memory = HostMemory(streams)
    masters = [host_block(memory, [1] * size) for size in sizes]
    with streams.hold_copies():  # all are ready when the first begins, so they run back to back
        for master in masters:
            streams.copy(streams.allocate(master.numel()), master, streams.onload_stream)
    streams.close()
    assert [(lane, nbytes) for lane, _, _, nbytes in spans] == [("onload", size) for size in sizes]
    for (_, start, _, _), (_, following, _, _), size in zip(spans, spans[1:], sizes, strict=False):
        assert following - start == pytest.approx(latency + size / bandwidth, rel=1e-3)  # oversleeping does not add up
    for (_, start, end, _), size in zip(spans, sizes, strict=True):
        assert end - start >= (latency + size / bandwidth) * 0.999


def test_elapsed_is_link_time_and_needs_timing_events(streams):
    memory = HostMemory(streams)
    source, block = host_block(memory, [1] * 1000), streams.allocate(1000)
    streams.bandwidth = 1e5
    start = streams.record(streams.onload_stream, timing=True)
    streams.copy(block, source, streams.onload_stream)
    end = streams.record(streams.onload_stream, timing=True)
    with pytest.raises(ValueError):
        streams.elapsed(start, streams.record(streams.onload_stream))
    streams.synchronize(end)
    assert streams.elapsed(start, end) >= 0.01


def test_jitter_is_the_same_for_the_same_seed():
    def delays(seed):
        streams = SimulatedStreams(jitter_seconds=1.0, seed=seed)
        return [streams.onload_stream.delay() for _ in range(5)] + [streams.offload_stream.delay() for _ in range(5)]

    assert delays(3) == delays(3) != delays(4)
    assert all(0 <= delay <= 1 for delay in delays(3))
    assert SimulatedStreams(seed=3).onload_stream.delay() == 0.0


def test_the_offload_bandwidth_follows_until_it_is_set():
    streams = SimulatedStreams(bandwidth=5.0)
    streams.bandwidth = 6.0
    assert streams.offload_bandwidth == 6.0
    streams.offload_bandwidth = 2.0
    streams.bandwidth = 7.0
    assert (streams.bandwidth, streams.offload_bandwidth) == (7.0, 2.0)
    assert SimulatedStreams(offload_bandwidth=1.0).offload_bandwidth == 1.0
    with pytest.raises(ValueError):
        streams.bandwidth = 0


def test_copies_are_checked(streams):
    memory = HostMemory(streams)
    host, block, other = memory.allocate(8), streams.allocate(8), streams.allocate(8)
    for destination, source, stream in [
        (block, memory.allocate(7), streams.onload_stream),  # lengths
        (host, host, streams.onload_stream),  # no device side
        (block, other, streams.onload_stream),  # no host side
        (host, block, streams.onload_stream),  # wrong direction
        (block, host, streams.offload_stream),
        (block.view(torch.float32), host.view(torch.float32), streams.onload_stream),
        (block[::2], host[::2], streams.onload_stream),
        (block, host, streams.current_stream()),
    ]:
        with pytest.raises(ValueError):
            streams.copy(destination, source, stream)
    streams.free(block)
    with pytest.raises(ValueError):
        streams.copy(block, host, streams.onload_stream)


def test_copying_nothing_is_nothing(streams):
    streams.copy(streams.allocate(0), torch.empty(0, dtype=torch.uint8), streams.onload_stream)
    assert streams.onload_stream._thread is None and streams.host_waits == 0


# -- errors ------------------------------------------------------------------------------------------------------------
def test_nothing_behind_a_failed_copy_happens_until_the_host_was_told(streams):
    memory = HostMemory(streams)
    source, block = host_block(memory, [1]), streams.allocate(1)
    streams.fail_copy = lambda number: OSError("bus") if number == 0 else None
    before = streams.record(streams.onload_stream)
    streams.copy(block, source, streams.onload_stream)
    failed = streams.record(streams.onload_stream)
    streams.copy(block, source, streams.onload_stream)
    behind = streams.record(streams.onload_stream)
    streams.synchronize(before)
    assert not streams.failed(before)
    for event in (failed, behind):
        with pytest.raises(OSError, match="bus"):
            streams.synchronize(event)
        with pytest.raises(OSError, match="bus"):
            streams.wait(streams.current_stream(), event)
        assert streams.done(event) and streams.failed(event)
    assert block.tolist() == [255]
    streams.copy(block, source, streams.onload_stream)
    streams.synchronize(streams.record(streams.onload_stream))
    assert block.tolist() == [1]


def test_what_a_failed_copy_should_have_saved_is_neither_overwritten_nor_poisoned(streams):
    memory = HostMemory(streams)
    source, other, target = (host_block(memory, [value]) for value in (1, 2, 3))
    block = streams.allocate(1)
    streams.copy(block, source, streams.onload_stream)
    streams.synchronize(streams.record(streams.onload_stream))
    streams.fail_copy = lambda number: OSError("bus") if streams.offload_stream.copies else None
    with streams.hold_copies("offload"):
        streams.copy(target, block, streams.offload_stream)
        saved = streams.record(streams.offload_stream)
        free = streams.discard(block, saved)
        streams.wait(streams.onload_stream, free)
        streams.copy(block, other, streams.onload_stream)
        overwritten = streams.record(streams.onload_stream)
    with pytest.raises(OSError, match="bus"):
        streams.synchronize(overwritten)
    assert block.tolist() == [1] and target.tolist() == [3]
    streams.free(block, (saved,))
    assert block.tolist() == [1]


def test_an_error_passes_through_a_wait_to_the_other_engine(streams):
    memory = HostMemory(streams)
    source, block = host_block(memory, [1]), streams.allocate(1)
    streams.fail_copy = lambda number: OSError("bus")
    streams.copy(block, source, streams.onload_stream)
    streams.wait(streams.offload_stream, streams.record(streams.onload_stream))
    with pytest.raises(OSError, match="bus"):
        streams.synchronize(streams.record(streams.offload_stream))
