"""CUDA: the calls it makes, on a fake where there is no GPU; the real thing, marked `gpu`, where there is one."""

from __future__ import annotations

import logging
import mmap
import re
import sys
from contextlib import contextmanager

import pytest
import torch

from lib_async_lowvram.device import cuda_errors
from lib_async_lowvram.device.cuda import CudaStreams
from lib_async_lowvram.device.cuda_errors import PendingError, mapped_libraries
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.recorder import OrderingViolation, RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import ALIGNMENT
from lib_async_lowvram.device.use_logger import UseLogger

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")]


# -- a fake torch.cuda -------------------------------------------------------------------------------------------------
class Fake:
    """Stands in for the parts of `torch.cuda` that CudaStreams uses; writes down the order of calls."""

    def __init__(self, monkeypatch) -> None:
        self.calls: list[str] = []
        self.current = None
        self.register_result = 0
        self.unregister_result = 0
        fake, empty = self, torch.empty

        class Stream:
            def __init__(self, device=None, name=None):
                self.name = name or ("onload", "offload")[fake.made]
                fake.made += name is None

            def wait_event(self, event):
                fake.calls.append(f"{self.name} waits {event.name}")

            def synchronize(self):
                fake.calls.append(f"synchronize {self.name}")

        class Event:
            def __init__(self, enable_timing=False):
                self.timing, self.name = enable_timing, None

            def record(self, stream):
                fake.events += 1
                self.name = f"e{fake.events}"
                fake.calls.append(f"record {self.name} on {stream.name}")

            def query(self):
                return True

            def synchronize(self):
                fake.calls.append(f"synchronize {self.name}")

            def elapsed_time(self, end):
                return 1500.0

        @contextmanager
        def stream(wanted):
            before, fake.current = fake.current, wanted
            fake.calls.append(f"enter {wanted.name}")
            try:
                yield
            finally:
                fake.current = before

        @contextmanager
        def device(wanted):
            yield

        class Runtime:
            @staticmethod
            def cudaHostRegister(address, nbytes, flags):
                fake.calls.append(f"register {nbytes} {flags}")
                return fake.register_result

            @staticmethod
            def cudaHostUnregister(address):
                fake.calls.append("unregister")
                return fake.unregister_result

        self.made = self.events = self.peak = 0
        self.default, self.current = Stream(name="default"), Stream(name="model")
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": stream,
            "device": device,
            "cudart": Runtime,
            "current_device": lambda: 1,
            "current_stream": lambda device: self.current,
            "default_stream": lambda device: self.default,
            "get_device_name": lambda device: "Fake GPU",
            "mem_get_info": lambda device: (1000, 5000),
            "memory_reserved": lambda device: 700,
            "memory_allocated": lambda device: 300,
            "max_memory_allocated": lambda device: self.peak,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

        def fake_empty(nbytes, dtype, device):
            self.calls.append(f"empty on {self.current.name}")
            self.peak += nbytes
            return empty(nbytes, dtype=dtype)

        monkeypatch.setattr(torch, "empty", fake_empty)


@pytest.fixture
def fake(monkeypatch):
    return Fake(monkeypatch)


@pytest.fixture
def streams(fake):
    return CudaStreams(errors=PendingError(lambda: 0, "a fake"))


def test_the_device_is_named_with_its_index(streams, fake):
    assert streams.device == torch.device("cuda:1") and streams.name == "cuda:1 Fake GPU"
    assert CudaStreams.knows_stalls is False
    with pytest.raises(ValueError):
        CudaStreams("cpu")


def test_events_are_recorded_when_made(streams, fake):
    event = streams.record(streams.onload_stream)
    streams.wait(streams.current_stream(), event)
    assert fake.calls == ["record e1 on onload", "model waits e1"]
    assert streams.done(event) and streams.host_waits == 0
    streams.synchronize(event)
    assert streams.host_waits == 1
    with pytest.raises(ValueError):
        streams.elapsed(event, event)
    timed = streams.record(streams.onload_stream, timing=True)
    assert streams.elapsed(timed, timed) == 1.5


def test_copies_run_on_their_stream_and_pageable_ones_are_counted(streams, fake, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self is device))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    host, device = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    streams.copy(device, host, streams.onload_stream)
    assert fake.calls == ["enter onload"] and device.tolist() == [0, 1, 2, 3] and streams.host_waits == 1
    assert streams.current_stream().name == "model"
    streams._pinned.add(host.data_ptr(), 4)
    streams.copy(host, device, streams.offload_stream)
    assert fake.calls[1:] == ["enter offload"] and streams.host_waits == 1


def test_blocks_belong_to_the_default_stream_and_everybody_waits_for_it(streams, fake):
    block = streams.allocate(1000)
    assert fake.calls == [
        "enter default",
        "empty on default",
        "record e1 on default",
        "onload waits e1",
        "offload waits e1",
        "model waits e1",
    ]
    assert streams.allocated_bytes == streams.peak_allocated_bytes == 1024
    event = streams.record(streams.offload_stream)
    del fake.calls[:]
    streams.free(block, (event,))
    assert fake.calls == ["default waits e2"]
    assert streams.allocated_bytes == 0 and streams.peak_allocated_bytes == 1024
    streams.reset_peak()
    assert streams.peak_allocated_bytes == 0
    for wrong in (block, torch.zeros(3, dtype=torch.uint8)):
        with pytest.raises(ValueError):
            streams.free(wrong)
    streams.free(streams.allocate(0))


def test_free_memory_counts_what_the_cache_can_give(streams):
    assert streams.free_memory() == 1000 + 700 - 300


def test_activation_growth_is_the_others_peak_over_their_present_size(streams, fake, monkeypatch):
    now = 300
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: now)
    fake.peak = 900
    assert streams.activation_growth() == 600
    block = streams.allocate(1024)
    now = 300 + 1024
    assert fake.peak == 900 + 1024  # the block raised torch's own peak, by being allocated
    assert streams.activation_growth() == 600
    fake.peak = 2500 + 1024  # then computing did
    assert streams.activation_growth() == 2200
    streams.free(block)
    now = 300
    assert streams.activation_growth() == 2200
    fake.peak = 400  # somebody reset torch's counter
    assert streams.activation_growth() == 2200


def test_pinning(streams, fake):
    assert streams.pin(4 * mmap.PAGESIZE, 5000)
    streams.unpin(4 * mmap.PAGESIZE)
    assert fake.calls == ["register 5000 1", "unregister"]
    with pytest.raises(ValueError):
        streams.pin(4 * mmap.PAGESIZE + 8, 5000)


def test_a_refusal_is_cleared(fake, caplog):
    pending = [712]
    streams = CudaStreams("cuda:0", errors=PendingError(lambda: pending.pop() if pending else 0, "a fake"))
    fake.register_result = 712
    with caplog.at_level(logging.WARNING, "async_lowvram"):
        assert not streams.pin(mmap.PAGESIZE, 100)
    assert pending == [] and not caplog.records


def test_a_refusal_that_cannot_be_cleared_is_told_once(fake, caplog):
    streams = CudaStreams("cuda:0", errors=PendingError(lambda: 999, "a fake"))
    fake.register_result = fake.unregister_result = 712
    with caplog.at_level(logging.WARNING, "async_lowvram"):
        assert not streams.pin(mmap.PAGESIZE, 100) and not streams.pin(mmap.PAGESIZE, 100)
        streams.unpin(mmap.PAGESIZE)
    assert len(caplog.records) == 1 and "712" in caplog.text and "a fake" in caplog.text


def test_foreign_events_are_refused(streams):
    other = SimulatedStreams()
    with pytest.raises(TypeError):
        streams.wait(streams.onload_stream, other.record(other.current_stream()))
    streams.close()


# -- the pending error -------------------------------------------------------------------------------------------------
def test_clear_tells_whether_the_error_is_gone():
    pending = [2]
    assert PendingError(lambda: pending.pop() if pending else 0, "once").clear() and pending == []
    assert not PendingError(lambda: 35, "sticky").clear()


def test_without_a_runtime_nothing_is_cleared(monkeypatch):
    monkeypatch.setattr(cuda_errors, "candidates", lambda: iter([("a library without it", object())]))
    error = PendingError()
    assert error.mechanism is None and not error.clear()


@pytest.mark.skipif(sys.platform == "win32", reason="finds mapped libraries by /proc")
def test_a_build_with_a_runtime_finds_it_and_one_without_does_not():
    error = PendingError()
    if torch.version.cuda or torch.version.hip:
        assert re.match(r"(cuda|hip)GetLastError of ", error.mechanism)
        assert isinstance(error._get_last_error(), int)
    else:
        assert error.mechanism is None


@pytest.mark.skipif(not (torch.version.cuda and sys.platform == "linux"), reason="this torch was built without CUDA")
def test_the_runtime_is_also_found_by_its_mapping():
    paths = mapped_libraries(cuda_errors._MAPPED_RUNTIME)
    assert paths and "libcudart" in paths[0]
    assert [where for where, library in cuda_errors.candidates() if hasattr(library, "cudaGetLastError")]


def test_mapped_libraries_are_read_from_maps(tmp_path):
    runtime, other = tmp_path / "libcudart-0ab.so.12", tmp_path / "libother.so"
    runtime.touch()
    other.touch()
    maps = tmp_path / "maps"
    maps.write_text(
        f"7f00-7f01 r--p 00000000 08:01 1    {runtime}\n7f01-7f02 r-xp 00000000 08:01 1    {runtime}\n"
        f"7f02-7f03 r--p 00000000 08:01 2    {other}\n7f03-7f04 rw-p 00000000 00:00 0\n"
        f"7f04-7f05 r--p 00000000 08:01 3    {tmp_path}/libamdhip64.so.6 (deleted)\n"
    )
    assert mapped_libraries(cuda_errors._MAPPED_RUNTIME, maps) == [str(runtime)]
    assert mapped_libraries(cuda_errors._MAPPED_RUNTIME, tmp_path / "missing") == []


# -- a real GPU --------------------------------------------------------------------------------------------------------
class TestOnAGpu:
    pytestmark = gpu

    def test_a_round_trip_without_a_host_wait(self):
        streams = CudaStreams()
        memory = HostMemory(streams)
        source, target = memory.allocate(1 << 20), memory.allocate(1 << 20)
        source.copy_(torch.arange(1 << 20).to(torch.uint8))
        assert memory.pin(source) and memory.pin(target) and source.is_pinned()
        block = streams.allocate(1 << 20)
        assert block.data_ptr() % ALIGNMENT == 0
        streams.copy(block, source, streams.onload_stream)
        copied = streams.record(streams.onload_stream)
        streams.wait(streams.current_stream(), copied)
        block.add_(1)
        streams.wait(streams.offload_stream, streams.record(streams.current_stream()))
        streams.copy(target, block, streams.offload_stream)
        done = streams.record(streams.offload_stream)
        assert streams.host_waits == 0
        streams.synchronize(done)
        assert torch.equal(target, source + 1) and streams.host_waits == 1
        streams.free(block, (done,))
        streams.close()

    def test_a_refused_pin_leaves_no_error_behind(self):
        streams = CudaStreams()
        memory = HostMemory(streams)
        block = memory.allocate(1 << 16)
        assert memory.pin(block)
        assert not streams.pin(block.data_ptr(), 1 << 16)  # registered already
        assert streams._errors.mechanism is not None and not streams._told_uncleared
        assert torch.ones(8, device=streams.device).sum().item() == 8

    def test_a_dying_block_is_unpinned(self):
        streams = CudaStreams()
        memory = HostMemory(streams)
        block = memory.allocate(1 << 16)
        memory.pin(block)
        del block
        again = memory.allocate(1 << 16)
        assert memory.pin(again) and not streams._told_uncleared

    def test_timing_and_free_memory(self):
        streams = CudaStreams()
        before = streams.free_memory()
        block = streams.allocate(64 << 20)
        assert before - streams.free_memory() >= 60 << 20
        activations = torch.empty(96 << 20, dtype=torch.uint8, device=streams.device)
        del activations
        assert streams.activation_growth() >= 96 << 20
        host = HostMemory(streams).allocate(64 << 20)
        start = streams.record(streams.onload_stream, timing=True)
        streams.copy(block, host, streams.onload_stream)
        end = streams.record(streams.onload_stream, timing=True)
        assert streams.host_waits == 1  # pageable
        streams.synchronize(end)
        assert streams.elapsed(start, end) > 0
        streams.free(block, (end,))

    def test_the_recorder_judges_a_gpu_too(self):
        streams = RecordingStreams(CudaStreams())
        memory = HostMemory(streams)
        master = memory.allocate(4096)
        memory.pin(master)
        block = streams.allocate(4096)
        streams.copy(block, master, streams.onload_stream)
        streams.wait(streams.current_stream(), streams.record(streams.onload_stream))
        with UseLogger(streams):
            block.view(torch.float32) + 1
        streams.check()
        streams.copy(block, master, streams.onload_stream)
        with pytest.raises(OrderingViolation):
            streams.check()
        streams.synchronize(streams.record(streams.onload_stream))
