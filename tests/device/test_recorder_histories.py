"""The ordering judge over whole models, long runs and random schedules: what it keeps, and that it misses nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_async_lowvram.device.happens_before import AccessHistory, Operation, join
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.recorder import OrderingViolation, RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.use_logger import UseLogger
from tests.device.recorder_rig import Bench, N


@pytest.fixture
def bench():
    return Bench()


# -- the model's own operations ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("waits", [True, False])
def test_a_model_under_the_use_logger(bench, mode, waits):
    layer = torch.nn.Linear(16, 15, bias=False)
    weight = bench.slot[: 15 * 16 * 4].view(torch.float32).view(15, 16)
    copied = bench.onload()
    if waits:
        bench.streams.wait(bench.streams.current_stream(), copied)
    layer.weight.data = weight
    with mode(), UseLogger(bench.streams):
        layer.weight.detach().view(-1)  # views are no uses
        layer(torch.ones(2, 16))
    bench.verdict() if waits else bench.wrong("aten", "copy 1024 bytes")


def test_views_and_publishing_are_no_uses(bench):
    bench.onload()
    with UseLogger(bench.streams), torch.no_grad():
        parameter = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        parameter.data = bench.slot.view(torch.float32).view(16, 16).t()
        torch.empty_like(parameter)
    bench.verdict()


def test_poison_and_copies_are_not_uses(bench):
    with UseLogger(bench.streams):
        used = bench.compute(bench.onload())
        bench.streams.wait(bench.up, bench.streams.discard(bench.slot, used))
        bench.streams.free(bench.slot, (bench.onload(),))
        bench.streams.allocate(N)
    bench.verdict()


def test_tens_of_thousands_of_operations_stay_small(bench):
    s = bench.streams
    slots = [s.allocate(N) for _ in range(8)]
    ready = [s.record(s.current_stream()) for _ in slots]
    for step in range(3000):
        index = step % len(slots)
        s.wait(bench.up, ready[index])
        used = bench.compute(bench.onload(slot=slots[index]), slot=slots[index][step % 7 :])
        ready[index] = s.discard(slots[index], used)
    assert s.operations > 20_000
    assert len(s._history) < 100 and len(s._actors.lanes) <= len(slots) + 1
    bench.verdict()


def test_violations_are_kept_up_to_a_number():
    streams = RecordingStreams(SimulatedStreams(), keep=3)
    block = streams.allocate(N)
    host = HostMemory(streams).allocate(N)
    for _ in range(10):
        streams.copy(block, host, streams.onload_stream)
        streams.use(writes=[block])
    assert len(streams.violations) == 3
    with pytest.raises(OrderingViolation, match="3 unordered"):
        streams.check()


def test_a_time_is_known_only_to_a_thread_that_has_waited(bench):
    s = bench.streams
    start, end = s.record(s.current_stream(), timing=True), s.record(s.current_stream(), timing=True)
    with pytest.raises(OrderingViolation, match="does not know"):
        s.elapsed(start, end)
    assert s.done(end)
    assert s.elapsed(start, end) >= 0


def test_the_wrapper_passes_everything_through(bench):
    s, inner = bench.streams, bench.streams.inner
    assert (s.device, s.knows_stalls) == (inner.device, True)
    assert s.allocated_bytes == s.peak_allocated_bytes == N and s.free_memory() == inner.free_memory()
    start, end = s.record(s.current_stream(), timing=True), s.record(s.current_stream(), timing=True)
    s.synchronize(end)
    assert s.elapsed(start, end) >= 0
    assert s.host_waits == 1 and s.stall_seconds == 0.0 and s.owns(bench.slot.data_ptr())
    s.free(bench.slot, ())
    s.reset_peak()
    assert s.peak_allocated_bytes == 0
    with s.hold_copies():
        pass
    s.close()


# -- random schedules: drop any one necessary wait and it shows; drop none and it does not ------------------------------
@settings(max_examples=60, deadline=None)
@given(
    units=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12),
    slots=st.integers(1, 3),
    dropped=st.one_of(st.none(), st.integers(0, 1000)),
)
def test_any_missing_wait_of_a_streamed_pass_is_caught(units, slots, dropped):
    """A little mover: unit i uses slot i % slots and master m, and writes it back when dirty."""
    streams = RecordingStreams(SimulatedStreams(bandwidth=math.inf, latency=0.0, jitter_seconds=1e-5))
    memory = HostMemory(streams)
    masters = [memory.allocate(N) for _ in range(4)]
    for master in masters:
        memory.pin(master)
    ring = [streams.allocate(N) for _ in range(slots)]
    ready: list = [None] * slots
    written: list = [None] * 4
    waits = []

    def wait(stream, event):
        if event is not None:
            if dropped is None or len(waits) != dropped:
                streams.wait(stream, event)
            waits.append(event)

    for step, (number, dirty) in enumerate(units):
        slot = step % slots
        wait(streams.onload_stream, ready[slot])
        if written[number] is not None:
            streams.wait(streams.onload_stream, written[number])  # may be implied by others: never dropped
        streams.copy(ring[slot], masters[number], streams.onload_stream)
        wait(streams.current_stream(), streams.record(streams.onload_stream))
        streams.use(reads=[] if dirty else [ring[slot]], writes=[ring[slot]] if dirty else [], what=f"unit {step}")
        done = streams.record(streams.current_stream())
        if dirty:
            wait(streams.offload_stream, done)
            streams.copy(masters[number], ring[slot], streams.offload_stream)
            done = written[number] = streams.record(streams.offload_stream)
        ready[slot] = streams.discard(ring[slot], done)
    streams.inner.close()
    if dropped is None or dropped >= len(waits):
        streams.check()
    else:
        assert streams.violations


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(1, 12), st.booleans(), st.one_of(st.none(), st.integers(0, 2))),
        max_size=25,
    )
)
@settings(max_examples=200, deadline=None)
def test_history_against_brute_force(steps):
    """Per actor a clock; each step may first learn another actor's clock; accesses are compared pair by pair."""
    clocks = [{actor: 0} for actor in range(3)]
    history, past = AccessHistory(), []
    racy = False
    for number, (actor, start, length, writes, learns) in enumerate(steps):
        if learns is not None:
            join(clocks[actor], clocks[learns])
        clocks[actor][actor] += 1
        operation = Operation(number, actor, clocks[actor][actor], f"actor {actor}", "touch")
        clock, end = dict(clocks[actor]), start + length
        expected = {
            other.number
            for other, low, high, wrote in past
            if low < end and start < high and (writes or wrote) and not other.before(clock)
        }
        found = history.access(start, end, operation, writes, clock)
        assert {violation.earlier.number for violation in found} <= expected
        if not racy:  # the first race is always found; after it, older rivals may have been replaced
            assert bool(found) == bool(expected)
        racy = racy or bool(expected)
        assert all(start <= violation.start < violation.end <= end for violation in found)
        past.append((operation, start, end, writes))
    history.forget(0, 100)
    assert len(history) == 0


def test_forgetting_a_part_keeps_the_rest():
    history = AccessHistory()
    write = Operation(1, 0, 1, "a", "write")
    history.access(0, 30, write, True, {0: 1})
    history.forget(10, 20)
    later = Operation(2, 1, 1, "b", "read")
    assert [(v.start, v.end) for v in history.access(12, 18, later, False, {1: 1})] == []
    assert [(v.start, v.end) for v in history.access(5, 12, later, False, {1: 1})] == [(5, 10)]
    assert [(v.start, v.end) for v in history.access(18, 25, later, False, {1: 1})] == [(20, 25)]
    assert history.access(3, 3, later, True, {1: 1}) == []
