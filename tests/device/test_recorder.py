"""The ordering judge is a judge: wrong sequences are caught, right ones pass, whatever the timing of the day."""

from __future__ import annotations

import gc
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_async_lowvram.device.happens_before import AccessHistory, Operation, join
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.recorder import OrderingViolation, RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.use_logger import UseLogger

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


@pytest.fixture
def bench():
    return Bench()


# -- right sequences ---------------------------------------------------------------------------------------------------
def test_a_right_pass_with_reuse_write_back_and_free(bench):
    s = bench.streams
    copied = bench.onload()
    used = bench.compute(copied, writes=True)
    written = bench.write_back(used)
    ready = s.discard(bench.slot, written)
    s.wait(bench.up, ready)
    used = bench.compute(bench.onload(bench.other_master))
    s.wait(bench.up, written)  # the master is true again
    s.wait(bench.up, s.discard(bench.slot, used))
    used = bench.compute(bench.onload())
    s.free(bench.slot, (used,))
    again = s.allocate(N)
    bench.compute(bench.onload(slot=again), slot=again)
    bench.verdict()
    assert s.operations > 20 and len(s.log) == s.operations


def test_one_stream_needs_no_events(bench):
    for master in (bench.master, bench.other_master, bench.master):
        bench.onload(master)
    bench.verdict()


def test_reads_do_not_conflict(bench):
    copied = bench.onload()
    bench.compute(copied)
    bench.streams.wait(bench.down, copied)
    bench.streams.copy(bench.other_master, bench.slot, bench.down)
    bench.verdict()


def test_disjoint_ranges_do_not_conflict(bench):
    bench.onload(bench.master[: N // 2], bench.slot[: N // 2])
    bench.compute(slot=bench.slot[N // 2 :], writes=True)
    bench.verdict()


@pytest.mark.parametrize("how", ["synchronize", "done"])
def test_what_the_host_waited_for_is_before_everything_it_enqueues_later(bench, how):
    copied = bench.onload()
    if how == "synchronize":
        bench.streams.synchronize(copied)
    else:
        bench.streams.inner.synchronize(copied.inner)
        assert bench.streams.done(copied)
    bench.compute()
    bench.verdict()


def test_the_host_may_write_a_master_and_then_enqueue_its_copy(bench):
    bench.streams.register_host(bench.master)
    with UseLogger(bench.streams):
        bench.master.fill_(3)
    bench.onload()
    bench.verdict()


def test_a_blocking_operation_between_host_and_device_makes_the_host_wait(bench):
    bench.streams.register_host(bench.master)
    copied = bench.onload(bench.other_master)
    bench.streams.wait(bench.streams.current_stream(), copied)
    with UseLogger(bench.streams):
        bench.master.copy_(bench.slot)
    bench.onload(slot=bench.streams.allocate(N))
    bench.verdict()
    with UseLogger(bench.streams):
        bench.master.copy_(bench.slot, non_blocking=True)
        bench.master.add_(1)
    bench.wrong("nothing makes")


# -- wrong sequences, each caught --------------------------------------------------------------------------------------
def test_missing_wait_for_copied(bench):
    bench.onload()
    bench.compute()
    bench.wrong("1. ", "copy 1024 bytes", "on the onload stream", "layer", f"{N} bytes")


def test_a_wait_on_an_event_before_the_copy(bench):
    early = bench.streams.record(bench.up)
    bench.onload()
    bench.compute(early)
    bench.wrong("copy")


def test_a_wait_by_another_stream_does_not_help(bench):
    copied = bench.onload()
    bench.streams.wait(bench.down, copied)
    bench.compute()
    bench.wrong("copy")


def test_slot_overwritten_before_its_last_use(bench):
    bench.compute(bench.onload())
    bench.onload(bench.other_master)
    bench.wrong("layer", "nothing makes")


def test_slot_overwritten_after_the_wrong_use(bench):
    copied = bench.onload()
    used = bench.compute(copied)
    bench.compute()  # used again, later
    bench.streams.wait(bench.up, used)
    bench.onload(bench.other_master)
    bench.wrong("layer")


def test_next_writer_ignores_the_discard(bench):
    used = bench.compute(bench.onload())
    bench.streams.discard(bench.slot, used)
    bench.streams.wait(bench.up, used)  # not the event discard returned
    bench.onload(bench.other_master)
    bench.wrong("discard")


def test_discard_before_the_last_use(bench):
    copied = bench.onload()
    bench.streams.discard(bench.slot, copied)
    bench.compute(copied)
    bench.wrong("discard", "layer")


def test_a_later_discard_does_not_stand_for_an_earlier_one(bench):
    other = bench.streams.allocate(N)
    used = bench.compute(bench.onload())
    bench.streams.discard(bench.slot, used)
    later = bench.streams.discard(other, used)
    bench.streams.wait(bench.up, later)
    bench.onload(bench.other_master)
    bench.wrong("discard")


def test_write_back_reads_before_compute_has_finished(bench):
    copied = bench.onload()
    bench.compute(copied, writes=True)
    bench.write_back(copied)
    bench.wrong("layer", "on the offload stream")


def test_slot_reused_before_its_write_back_is_done(bench):
    used = bench.compute(bench.onload(), writes=True)
    bench.write_back(used)
    bench.streams.wait(bench.up, used)
    bench.onload(bench.other_master)
    bench.wrong("on the offload stream")


def test_onload_of_a_master_before_its_write_back_is_done(bench):
    used = bench.compute(bench.onload(), writes=True)
    bench.write_back(used)
    bench.onload(slot=bench.streams.allocate(N))
    bench.wrong("on the offload stream", "on the onload stream")


def test_the_host_reads_a_master_before_its_write_back_is_done(bench):
    written = bench.write_back(bench.compute(bench.onload(), writes=True))
    with UseLogger(bench.streams):
        bench.streams.wait(bench.streams.current_stream(), written)  # orders the stream, not the host
        bench.master.clone()
    bench.wrong("aten.clone", "host thread")


def test_the_host_writes_a_master_while_it_may_be_copied(bench):
    bench.onload()
    with UseLogger(bench.streams):
        bench.master.add_(1)
    bench.wrong("aten.add_", "host thread")


def test_free_before_the_last_use(bench):
    copied = bench.onload()
    bench.compute(copied)
    bench.streams.free(bench.slot, (copied,))
    bench.wrong("free", "layer")


def test_free_without_any_event(bench):
    bench.onload()
    bench.streams.free(bench.slot)
    bench.wrong("free")


@pytest.mark.parametrize("fails", [True, False])
def test_what_is_discarded_behind_a_copy_that_failed_is_still_there(bench, fails):
    s = bench.streams
    used = bench.compute(bench.onload(), writes=True)
    if fails:
        s.inner.fail_copy = lambda number: RuntimeError("bus")
    written = bench.write_back(used)
    s.discard(bench.slot, written)
    try:
        s.synchronize(written)
    except RuntimeError:
        assert fails
    s.inner.fail_copy = None
    assert s.failed(written) is fails
    s.use(reads=[bench.slot], what="save")
    bench.verdict() if fails else bench.wrong("discard", "save")


def test_what_one_block_is_free_behind_says_nothing_of_the_next(bench):
    other = bench.streams.allocate(N)
    used = bench.compute(bench.onload())
    bench.streams.free(other, (used,))
    bench.verdict()
    bench.streams.free(bench.slot)
    bench.wrong("free", "layer")


def test_another_thread_uses_new_memory_without_waiting(bench):
    def use():
        bench.compute()

    thread = threading.Thread(target=use, name="preview")
    thread.start()
    thread.join()
    bench.wrong("allocate", "compute stream of preview")


def test_unpinning_while_a_copy_may_still_read(bench):
    bench.onload()
    bench.memory.unpin(bench.master)
    bench.wrong("unpin")


def test_a_master_that_dies_while_a_copy_may_still_read(bench):
    bench.onload()
    bench.streams.inner.close()
    bench.master = None
    gc.collect()
    bench.wrong("unpin")


def test_giving_up_host_memory(bench):
    copied = bench.onload()
    seen = threading.Thread(target=bench.streams.synchronize, args=(copied,))
    seen.start()
    seen.join()
    bench.streams.forget_host(bench.master)  # some thread saw the copy done: good
    bench.verdict()


def test_each_thread_knows_only_what_it_waited_for_itself(bench):
    copied = bench.onload()
    bench.streams.synchronize(copied)
    thread = threading.Thread(target=bench.compute)
    thread.start()
    thread.join()
    bench.wrong("copy")


def test_foreign_events_are_refused(bench):
    with pytest.raises(TypeError):
        bench.streams.wait(bench.up, bench.streams.inner.record(bench.up))


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
