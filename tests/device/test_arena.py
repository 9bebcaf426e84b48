"""The arena: all of its memory or none, one block per resident, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lib_async_lowvram.device.arena import Arena
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams


@pytest.fixture
def streams() -> Iterator[SimulatedStreams]:
    made = SimulatedStreams(capacity_bytes=8192, bandwidth=1e12, latency=0.0)
    yield made
    made.close()


def test_slots_lie_in_one_slab_and_blocks_apart(streams: SimulatedStreams) -> None:
    arena = Arena(streams, 4096, {3: 512, 5: 1024})
    assert streams.allocated_bytes == 4096 + 512 + 1024
    first, second = arena.slot(0, 1000), arena.slot(1024, 3072)
    assert second.data_ptr() - first.data_ptr() == 1024
    assert (first.numel(), second.numel()) == (1000, 3072)
    assert first.data_ptr() % 512 == 0
    assert arena.block(3, 512).data_ptr() == arena.block(3, 100).data_ptr()
    assert arena.block(3, 100).numel() == 100
    assert arena.block(5, 1024).data_ptr() != arena.block(3, 512).data_ptr()
    arena.close(())
    assert streams.allocated_bytes == 0
    arena.close(())


@pytest.mark.parametrize(("ring", "blocks"), [(9000, {}), (4096, {0: 4096, 1: 512}), (0, {0: 4096, 1: 4096, 2: 1})])
def test_out_of_memory_leaves_nothing(streams: SimulatedStreams, ring: int, blocks: dict[int, int]) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Arena(streams, ring, blocks)
    assert streams.allocated_bytes == 0


def test_a_block_that_became_too_small_is_made_anew(streams: SimulatedStreams) -> None:
    arena = Arena(streams, 0, {0: 512})
    arena.block(0, 512)
    assert arena.block(0, 2048).numel() == 2048
    assert streams.allocated_bytes == 2048
    assert arena.block(7, 512).numel() == 512  # one that had none
    arena.release_block(0, ())
    arena.release_block(0, ())
    assert streams.allocated_bytes == 512
    arena.close(())


def test_a_replaced_block_is_given_back_behind_its_last_use() -> None:
    inner = SimulatedStreams(capacity_bytes=8192, bandwidth=1e12, latency=0.0)
    streams = RecordingStreams(inner)
    arena = Arena(streams, 0, {0: 512})
    streams.use(writes=[arena.block(0, 512)])
    streams.use(writes=[arena.block(0, 1024)])
    arena.close((streams.record(streams.current_stream()),))
    streams.check()
    inner.close()
