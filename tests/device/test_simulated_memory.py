"""Memory of the simulated device: blocks, poison, the cap, pinning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import ALIGNMENT, align
from tests.device.simulated_rig import host_block, poisoned


# -- device memory and poison ------------------------------------------------------------------------------------------
def test_blocks_are_aligned_poisoned_counted_and_capped(streams):
    blocks = [streams.allocate(size) for size in (1, 511, 512, 513)]
    assert all(block.data_ptr() % ALIGNMENT == 0 and poisoned(block) for block in blocks)
    assert [block.numel() for block in blocks] == [1, 511, 512, 513]
    assert torch.isnan(blocks[2].view(torch.float16)).all() and torch.isnan(blocks[2].view(torch.bfloat16)).all()
    assert streams.allocated_bytes == streams.peak_allocated_bytes == 512 * 5
    assert streams.free_memory() == (1 << 24) - 512 * 5
    assert streams.live_memory_ranges() == sorted((b.data_ptr(), b.data_ptr() + b.numel()) for b in blocks)
    assert streams.owns(blocks[3].data_ptr() + 512) and not streams.owns(blocks[3].data_ptr() + 513)
    streams.free(blocks[3])
    assert streams.allocated_bytes == 512 * 3 and streams.peak_allocated_bytes == 512 * 5
    assert not streams.owns(blocks[3].data_ptr())
    streams.reset_peak()
    assert streams.peak_allocated_bytes == 512 * 3


def test_the_cap_raises_what_torch_raises_and_changes_nothing(streams):
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate 16\.00 MiB"):
        streams.allocate((1 << 24) + 1 - 512 + 512 - 1 + 1)
    assert streams.allocated_bytes == 0
    whole = streams.allocate(1 << 24)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        streams.allocate(1)
    streams.free(whole)
    streams.free(streams.allocate(1 << 24))


@given(st.lists(st.integers(0, 5000), max_size=20), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_accounting_is_exact(sizes, random):
    streams = SimulatedStreams(capacity_bytes=50_000)
    living = []
    for size in sizes:
        if living and random.random() < 0.4:
            streams.free(living.pop(random.randrange(len(living))))
        try:
            living.append(streams.allocate(size))
        except torch.cuda.OutOfMemoryError:
            assert sum(align(block.numel()) for block in living) + align(size) > 50_000
        assert streams.allocated_bytes == sum(align(block.numel()) for block in living) <= 50_000


def test_foreign_and_double_frees_are_refused(streams):
    block = streams.allocate(1024)
    for wrong in (torch.empty(8, dtype=torch.uint8), block[512:], block[:512]):
        with pytest.raises(ValueError):
            streams.free(wrong)
    streams.free(block)
    with pytest.raises(ValueError):
        streams.free(block)
    assert streams.allocated_bytes == 0


def test_freed_memory_is_poisoned_after_its_last_use_only(streams):
    memory = HostMemory(streams)
    target, block = host_block(memory, [0]), streams.allocate(1)
    block.fill_(9)
    with streams.hold_copies("offload"):
        streams.copy(target, block, streams.offload_stream)
        streams.free(block, (streams.record(streams.current_stream()), streams.record(streams.offload_stream)))
        assert streams.allocated_bytes == 0 and block.tolist() == [9]
        done = streams.record(streams.offload_stream)
    streams.synchronize(done)
    assert target.tolist() == [9] and poisoned(block)


def test_discard_poisons_after_the_event_and_before_the_returned_one(streams):
    memory = HostMemory(streams)
    target, block = host_block(memory, [0] * 4), streams.allocate(4)
    block.fill_(9)
    with streams.hold_copies("offload"):
        streams.copy(target[:2], block[:2], streams.offload_stream)
        later = streams.discard(block[:2], streams.record(streams.offload_stream))  # not reached yet
        now = streams.discard(block[2:], streams.record(streams.current_stream()))  # reached
        streams.synchronize(now)
        assert block.tolist() == [9, 9, 255, 255] and not streams.done(later)
    streams.synchronize(later)
    assert target.tolist() == [9, 9, 0, 0] and poisoned(block)


def test_discard_comes_before_whoever_waits_for_it(streams):
    memory = HostMemory(streams)
    source, block = host_block(memory, [5]), streams.allocate(1)
    with streams.hold_copies():
        streams.copy(block, source, streams.onload_stream)
        free_again = streams.discard(block, streams.record(streams.onload_stream))
        streams.wait(streams.onload_stream, free_again)
        streams.copy(block, source, streams.onload_stream)
        copied = streams.record(streams.onload_stream)
    streams.synchronize(copied)
    assert block.tolist() == [5]


def test_without_poison_discard_is_its_argument():
    streams = SimulatedStreams(poison=False)
    block = streams.allocate(4)
    block.fill_(1)
    event = streams.record(streams.current_stream())
    assert streams.discard(block, event) is event
    streams.free(block)
    assert block.tolist() == [1] * 4


def test_blocks_and_poison_are_usable_across_inference_mode_and_unseen_by_dispatch_modes(streams):
    class Loud(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} was seen")

    with torch.inference_mode(), Loud():
        block = streams.allocate(8)
        streams.synchronize(streams.discard(block, streams.record(streams.current_stream())))
    assert not block.is_inference()


# -- pinning -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pinning, expected", [("all", True), ("none", False), (lambda address, nbytes: nbytes < 10, True)])
def test_pinning_policy(pinning, expected):
    streams = SimulatedStreams(pinning=pinning)
    memory = HostMemory(streams)
    block = memory.allocate(9)
    assert streams.pin(block.data_ptr(), 9) is expected
    assert streams.is_pinned(block.data_ptr(), 9) is expected
    assert not streams.is_pinned(block.data_ptr(), 10)
    if expected:
        assert not streams.pin(block.data_ptr(), 9)  # registered already: CUDA refuses too
        streams.unpin(block.data_ptr())
        streams.unpin(block.data_ptr())
        assert not streams.is_pinned(block.data_ptr(), 9)
        assert streams.pin(block.data_ptr(), 9)


def test_pinning_takes_whole_pages_only(streams):
    block = HostMemory(streams).allocate(9000)
    for address, nbytes in [(block.data_ptr() + 1, 10), (block.data_ptr(), 0)]:
        with pytest.raises(ValueError):
            streams.pin(address, nbytes)


@pytest.mark.parametrize("lane", ["onload", "offload"])
def test_a_copy_with_pageable_memory_blocks_its_caller_and_is_counted(streams, lane):
    block, host = streams.allocate(4), torch.arange(4, dtype=torch.uint8)
    if lane == "onload":
        streams.copy(block, host, streams.onload_stream)
    else:
        block.copy_(host)
        host.zero_()
        streams.copy(host, block, streams.offload_stream)
    assert block.tolist() == host.tolist() == [0, 1, 2, 3]
    assert streams.host_waits == 1


@pytest.mark.parametrize("poisoned", [False, True])
def test_freed_memory_is_handed_out_again_only_without_poison_and_after_its_last_use(poisoned: bool) -> None:
    streams = SimulatedStreams(capacity_bytes=1 << 20, bandwidth=1e12, latency=0.0, poison=poisoned)
    host = HostMemory(streams)
    master = host.allocate(4096)
    host.pin(master)
    block = streams.allocate(4096)
    with streams.hold_copies("onload"):
        streams.copy(block, master, streams.onload_stream)
        last_use = streams.record(streams.onload_stream)
        streams.free(block, (last_use,))
        early = streams.allocate(4096)
        assert early.data_ptr() != block.data_ptr()
    streams.synchronize(last_use)
    again = streams.allocate(4096)
    assert (again.data_ptr() == block.data_ptr()) is not poisoned
    assert streams.allocated_bytes == 8192
    streams.close()


# -- copies that were looked at before ---------------------------------------------------------------------------------
@pytest.fixture
def copied(streams):
    """(host memory, device block), between which onloads have just been made."""
    source, block = host_block(HostMemory(streams), [7, 8]), streams.allocate(2)
    for _ in range(2):
        streams.copy(block, source, streams.onload_stream)
    assert streams.host_waits == 0
    return source, block


def test_the_same_copy_waits_once_its_memory_is_not_pinned_any_more(streams, copied):
    source, block = copied
    streams.unpin(source.data_ptr())
    streams.copy(block, source, streams.onload_stream)
    assert streams.host_waits == 1
    assert streams.pin(source.data_ptr(), 2)
    streams.copy(block, source, streams.onload_stream)
    assert streams.host_waits == 1


def test_the_same_copy_is_refused_once_its_block_is_freed(streams, copied):
    source, block = copied
    streams.free(block)
    with pytest.raises(ValueError, match="not inside a living block"):
        streams.copy(block, source, streams.onload_stream)


def test_the_same_memory_in_the_other_direction_is_another_copy(streams, copied):
    source, block = copied
    with pytest.raises(ValueError, match="not inside a living block"):
        streams.copy(block, source, streams.offload_stream)


def test_what_is_remembered_of_copies_is_bounded(streams, copied, monkeypatch):
    source, block = copied
    monkeypatch.setattr("lib_async_lowvram.device.simulated.COPIES_KNOWN", 3)
    blocks = [streams.allocate(2) for _ in range(9)]
    for each in blocks:
        streams.copy(each, source, streams.onload_stream)
    assert len(streams._pinned_copies) <= 3
    streams.synchronize(streams.record(streams.onload_stream))
    assert all(each.tolist() == [7, 8] for each in blocks)
