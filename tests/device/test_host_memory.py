"""Host blocks: exact, page-aligned, pinned within the limit, unpinned when the storage dies and before it is unmapped."""

from __future__ import annotations

import copy
import gc
import logging
import mmap
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_async_lowvram.device import host_memory
from lib_async_lowvram.device.host_memory import HostMemory, default_pinned_limit_bytes, ram_bytes
from lib_async_lowvram.device.simulated import SimulatedStreams


class Pins(SimulatedStreams):
    """Writes down what is pinned and unpinned, and whether the memory was still there to be unpinned."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.events: list[tuple[str, int]] = []

    def pin(self, address: int, nbytes: int) -> bool:
        pinned = super().pin(address, nbytes)
        self.events.append(("pin" if pinned else "refused", nbytes))
        return pinned

    def unpin(self, address: int) -> None:
        import ctypes

        ctypes.string_at(address, 1)  # would be a segmentation fault after the unmapping
        self.events.append(("unpin", address))
        super().unpin(address)


@pytest.fixture
def streams():
    return Pins()


@pytest.fixture
def memory(streams):
    return HostMemory(streams)


@pytest.mark.parametrize("nbytes", [1, 511, mmap.PAGESIZE - 1, mmap.PAGESIZE, mmap.PAGESIZE + 1, 3 << 20])
def test_blocks_are_page_aligned_exact_and_zeroed(memory, nbytes):
    block = memory.allocate(nbytes)
    assert block.dtype == torch.uint8 and block.shape == (nbytes,)
    assert block.data_ptr() % mmap.PAGESIZE == 0
    assert block.untyped_storage().nbytes() == nbytes
    assert not block.any()
    assert memory.host_bytes == nbytes and memory.pinned_bytes == 0


def test_nothing_is_a_block_too(memory, streams):
    block = memory.allocate(0)
    assert block.numel() == 0 and memory.pin(block) and memory.is_pinned(block)
    memory.unpin(block)
    assert memory.host_bytes == memory.pinned_bytes == 0 and streams.events == []
    with pytest.raises(ValueError):
        memory.allocate(-1)


def test_pin_and_unpin(memory, streams):
    block = memory.allocate(5000)
    assert not memory.is_pinned(block)
    assert memory.pin(block) and memory.pin(block[10:20]) and memory.is_pinned(block[1:])
    assert memory.pinned_bytes == 5000
    memory.unpin(block)
    memory.unpin(block)
    assert memory.pinned_bytes == 0 and not memory.is_pinned(block)
    assert streams.events == [("pin", 5000), ("unpin", block.data_ptr())]


def test_foreign_tensors_are_refused(memory):
    for method in (memory.pin, memory.unpin, memory.is_pinned):
        with pytest.raises(ValueError, match="not a block"):
            method(torch.empty(10, dtype=torch.uint8))


def test_a_block_is_unpinned_when_its_storage_dies_whoever_held_it_last(memory, streams):
    block = memory.allocate(5000)
    address = block.data_ptr()
    memory.pin(block)
    kept = block[100:108].view(torch.float32)
    del block, memory
    gc.collect()
    assert streams.events == [("pin", 5000)] and kept.shape == (2,)
    del kept
    assert streams.events == [("pin", 5000), ("unpin", address)]
    assert not streams.is_pinned(address, 5000)


def test_a_block_in_a_garbage_cycle_is_unpinned_by_the_collector(memory, streams):
    module = torch.nn.Module()
    module.block, module.self = memory.allocate(5000), [module]
    memory.pin(module.block)
    del module
    gc.collect()
    assert [kind for kind, _ in streams.events] == ["pin", "unpin"]
    assert memory.pinned_bytes == memory.host_bytes == 0


def test_no_cycle_keeps_a_block_or_the_memory_alive(streams):
    gc.disable()
    try:
        memory = HostMemory(streams)
        block = memory.allocate(10)
        memory.pin(block)
        memory_gone = __import__("weakref").ref(memory)
        del memory
        assert memory_gone() is None
        del block
        assert [kind for kind, _ in streams.events] == ["pin", "unpin"]
    finally:
        gc.enable()


def test_deepcopy_and_dying_copies_leave_the_block_alone(memory, streams):
    block = memory.allocate(5000)
    memory.pin(block)
    del_me = copy.deepcopy(block)
    del del_me
    assert memory.pinned_bytes == 5000 and streams.events == [("pin", 5000)]


def test_the_limit_holds_exactly_and_the_first_refusal_is_logged(streams, caplog):
    memory = HostMemory(streams, pinned_limit_bytes=10_000)
    blocks = [memory.allocate(size) for size in (6000, 4001, 4000, 1)]
    with caplog.at_level(logging.WARNING, "async_lowvram"):
        assert [memory.pin(block) for block in blocks] == [True, False, True, False]
    assert memory.pinned_bytes == 10_000 and memory.refusals == 2
    assert len(caplog.records) == 1 and "10001 of at most 10000" in caplog.text
    del blocks[0]
    assert memory.pin(blocks[0])


def test_a_device_that_refuses_is_believed(caplog):
    streams = Pins(pinning=lambda address, nbytes: nbytes < 100)
    memory = HostMemory(streams)
    large, small = memory.allocate(100), memory.allocate(99)
    with caplog.at_level(logging.WARNING, "async_lowvram"):
        assert not memory.pin(large) and memory.pin(small)
    assert memory.refusals == 1 and memory.pinned_bytes == 99 and not memory.is_pinned(large)
    assert "would not pin 100 bytes" in caplog.text


@given(st.lists(st.tuples(st.integers(1, 9000), st.booleans()), max_size=25))
@settings(max_examples=30, deadline=None)
def test_books_balance(steps):
    streams = Pins()
    memory = HostMemory(streams, pinned_limit_bytes=20_000)
    living = []
    for size, drop in steps:
        living.append(memory.allocate(size))
        memory.pin(living[-1])
        if drop:
            del living[len(living) // 2]
        assert memory.host_bytes == sum(block.numel() for block in living)
        assert memory.pinned_bytes == sum(block.numel() for block in living if memory.is_pinned(block)) <= 20_000
    del living
    pinned, unpinned = [[event for event in streams.events if event[0] == kind] for kind in ("pin", "unpin")]
    assert len(pinned) == len(unpinned) and memory.pinned_bytes == memory.host_bytes == 0


def test_the_limit_holds_over_threads(streams):
    memory = HostMemory(streams, pinned_limit_bytes=50 * 100)
    kept, start = [], threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(50):
            block = memory.allocate(100)
            if memory.pin(block):
                kept.append(block)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kept) == 50 and memory.pinned_bytes == 5000 and memory.refusals == 150


def test_blocks_are_ordinary_tensors_even_if_born_in_inference_mode(memory):
    with torch.inference_mode():
        block = memory.allocate(8)
    block.add_(1)
    assert block.tolist() == [1] * 8


def test_automatic_limit(streams, monkeypatch):
    assert ram_bytes() > 1 << 28
    monkeypatch.setattr(host_memory, "ram_bytes", lambda: 1000)
    assert default_pinned_limit_bytes() == 600 == HostMemory(streams).pinned_limit_bytes
    monkeypatch.setattr(host_memory.sys, "platform", "win32")
    assert default_pinned_limit_bytes() == 400
    assert HostMemory(streams, pinned_limit_bytes=-5).pinned_limit_bytes == 400


@pytest.mark.parametrize(
    ("release", "wsl"),
    [
        ("5.15.167.4-microsoft-standard-WSL2", True),
        ("6.18.33.2-microsoft-standard-WSL2+", True),
        ("4.4.0-19041-Microsoft", True),
        ("6.1.0-custom-WSL2", True),
        ("6.8.0-45-generic", False),
        ("5.14.0-427.el9.x86_64", False),
        ("", False),
    ],
)
def test_automatic_limit_under_wsl(release, wsl, monkeypatch):
    monkeypatch.setattr(host_memory.sys, "platform", "linux")
    monkeypatch.setattr(host_memory, "ram_bytes", lambda: 16 << 30)
    assert default_pinned_limit_bytes(release) == (512 << 20 if wsl else int((16 << 30) * 0.6))
    monkeypatch.setattr(host_memory.platform, "release", lambda: release)
    assert default_pinned_limit_bytes() == default_pinned_limit_bytes(release)
    monkeypatch.setattr(host_memory, "ram_bytes", lambda: 512 << 20)  # a small machine has its share all the same
    assert default_pinned_limit_bytes(release) == int((512 << 20) * 0.6)


def test_living_blocks_survive_the_end_of_the_interpreter_quietly():
    script = """
import torch
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
streams = SimulatedStreams()
memory = HostMemory(streams)
block = memory.allocate(5000)
memory.pin(block)
device = streams.allocate(5000)
streams.bandwidth = 1.0
streams.copy(device, block, streams.onload_stream)  # in flight for good
module = torch.nn.Module(); module.block = block; module.cycle = module
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
