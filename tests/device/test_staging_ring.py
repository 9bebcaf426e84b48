"""The staging ring and its thread by themselves: no piece is filled under its copy, errors go where they belong, nothing stays."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.staging import PIECE_BYTES, Progress, Stager, last_of, ring_bytes_for
from lib_async_lowvram.device.streams import ALIGNMENT


class Case:
    """A device under the judge, its host memory, and a stager with a ring of `ring` bytes."""

    def __init__(self, ring: int = 2048, **settings: object) -> None:
        self.inner = SimulatedStreams(**{"bandwidth": float("inf"), "latency": 0.0, **settings})
        self.streams = RecordingStreams(self.inner)
        self.host = HostMemory(self.streams)
        self.stager = Stager(self.streams, self.host)
        assert self.stager.open(ring)

    def master(self, nbytes: int, seed: int = 0) -> torch.Tensor:
        block = self.host.allocate(nbytes)
        block.copy_(torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8))
        return block


@pytest.fixture
def case() -> Iterator[Case]:
    made = Case()
    yield made
    made.stager.close()
    assert made.host.pinned_bytes == 0
    made.streams.check()
    made.streams.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "async-lowvram-staging"]


@given(sizes=st.lists(st.integers(1, 7000), min_size=1, max_size=12), ring=st.integers(2, 9), jitter=st.sampled_from([0.0, 1e-4]))
def test_every_byte_arrives(sizes: list[int], ring: int, jitter: float) -> None:
    case = Case(ring * 2 * ALIGNMENT, jitter_seconds=jitter)
    masters = [case.master(nbytes, seed) for seed, nbytes in enumerate(sizes)]
    blocks = [case.streams.allocate(nbytes) for nbytes in sizes]
    jobs = [case.stager.submit(block, master) for block, master in zip(blocks, masters, strict=True)]
    for job, block, master in zip(jobs, blocks, masters, strict=True):
        case.streams.synchronize(job.event())
        assert torch.equal(block, master)
    case.stager.close()
    case.streams.check()
    case.streams.close()


def test_what_is_let_go_of_is_not_copied(case: Case) -> None:
    masters = [case.master(2048, seed) for seed in range(3)]
    blocks = [case.streams.allocate(2048) for _ in masters]
    with case.inner.hold_copies("onload"):
        first, second, third = [case.stager.submit(block, master) for block, master in zip(blocks, masters, strict=True)]
        case.streams.synchronize(case.streams.record(case.streams.current_stream()))
        first.event()  # both of its pieces are in the ring now, and held; the second job waits for room
        third.let_go()
        assert third.progress is Progress.OVER and second.progress is not Progress.OVER
        with pytest.raises(AssertionError):
            third.event()
    case.streams.synchronize(second.event())
    assert torch.equal(blocks[0], masters[0]) and torch.equal(blocks[1], masters[1]) and not torch.equal(blocks[2], masters[2])
    case.streams.synchronize(last_of(third, case.streams))


def test_a_master_is_read_behind_its_write_back(case: Case) -> None:
    master, changed, block = case.master(900), case.streams.allocate(900), case.streams.allocate(900)
    assert case.host.pin(master)  # or the write-back would hold up this thread
    case.streams.use(writes=[changed], what="changed")
    changed.fill_(7)
    case.streams.wait(case.streams.offload_stream, case.streams.record(case.streams.current_stream()))
    with case.inner.hold_copies("offload"):
        case.streams.copy(master, changed, case.streams.offload_stream)
        job = case.stager.submit(block, master, case.streams.record(case.streams.offload_stream))
    case.streams.synchronize(job.event())
    assert block.eq(7).all()


def test_an_error_is_raised_for_its_own_waiter_and_the_thread_goes_on(case: Case) -> None:
    good, short = case.master(100), case.streams.allocate(100)
    wrong = case.stager.submit(case.master(100), case.master(100, 1))  # not device memory
    right = case.stager.submit(short, good)
    case.streams.synchronize(right.event())
    assert torch.equal(short, good)
    for _ in range(2):
        with pytest.raises(ValueError, match="device side"):
            wrong.event()
    wrong.let_go()


def test_a_thread_that_was_ended_from_outside_is_replaced(case: Case) -> None:
    case.stager._work.stop()
    case.stager._thread.join(10)
    case.stager._work.stopped = False
    block, master = case.streams.allocate(3000), case.master(3000)
    case.streams.synchronize(case.stager.submit(block, master).event())
    assert torch.equal(block, master)


def test_settling_and_closing_with_jobs_queued(case: Case) -> None:
    masters = [case.master(5000, seed) for seed in range(4)]
    jobs = [case.stager.submit(case.streams.allocate(5000), master) for master in masters]
    case.stager.settle()
    assert all(job.progress is Progress.OVER for job in jobs)
    for master in masters:
        with case.streams._lock:
            case.streams.use(writes=[master], what="the host rewrites it")
    case.stager.close()
    case.stager.close()
    assert case.stager.ring_bytes == 0 == case.host.pinned_bytes


def test_a_dropped_stager_ends_its_thread_and_gives_the_ring_back() -> None:
    case = Case()
    thread, gone = case.stager._thread, weakref.ref(case.stager)
    case.stager = None
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert case.host.pinned_bytes == 0 == case.host.host_bytes
    case.streams.close()


@pytest.mark.parametrize(
    ("largest", "room", "expected"),
    [
        (1, 1 << 30, 2 * ALIGNMENT),
        (5 << 20, 1 << 30, 10 << 20),
        (100 << 20, 1 << 30, 2 * PIECE_BYTES),
        (100 << 20, 1 << 20, 1 << 20),
        (100, 2 * ALIGNMENT - 1, 0),
        (100, 0, 0),
    ],
)
def test_the_size_of_a_ring(largest: int, room: int, expected: int) -> None:
    assert ring_bytes_for(largest, room) == expected
    assert expected <= max(room, 0)


def test_a_ring_that_may_not_be_pinned() -> None:
    streams = SimulatedStreams(pinning="none")
    stager = Stager(streams, HostMemory(streams))
    assert not stager.open(4096) and not stager.open(0) and not stager.ring_bytes
    stager.settle()
    stager.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "async-lowvram-staging"]
    streams.close()
