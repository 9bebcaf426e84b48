"""The ordering judge is a judge: wrong sequences are caught, right ones pass, whatever the timing of the day."""

from __future__ import annotations

import gc
import threading

import pytest

from lib_async_lowvram.device.use_logger import UseLogger
from tests.device.recorder_rig import Bench, N


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
