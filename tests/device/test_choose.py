"""Choosing the device: names, the environment, hostile values, and devices to stand down on."""

from __future__ import annotations

import logging

import pytest
import torch

from lib_async_lowvram.device import choose
from lib_async_lowvram.device.choose import UnsupportedDevice, open_streams
from lib_async_lowvram.device.simulated import SimulatedStreams

SIMULATED = {"ASYNC_LOWVRAM_DEVICE": "simulated"}


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    monkeypatch.setattr(choose, "CudaStreams", lambda device: ("cuda", device))


def test_a_streams_is_taken_as_it_is():
    streams = SimulatedStreams()
    assert open_streams(streams, {}) is streams


def test_simulated_by_name_by_environment_and_for_lack_of_anything_else(no_cuda):
    for device, environment in [
        ("simulated", {}),
        (None, {}),
        (None, SIMULATED),
        ("cpu", SIMULATED),
        (torch.device("cpu"), {"ASYNC_LOWVRAM_DEVICE": " Simulated "}),
    ]:
        assert isinstance(open_streams(device, environment), SimulatedStreams)


def test_the_environment_is_read_by_default(monkeypatch, cuda):
    monkeypatch.setenv("ASYNC_LOWVRAM_DEVICE", "simulated")
    monkeypatch.setenv("ASYNC_LOWVRAM_SIM_CAPACITY", "2000000")
    assert open_streams().total_memory() == 2_000_000


def test_cuda_where_present_and_where_named(cuda):
    assert open_streams(None, {}) == ("cuda", torch.device("cuda"))
    assert open_streams("cuda:1", {}) == ("cuda", torch.device("cuda:1"))
    assert open_streams(torch.device("cuda", 0), SIMULATED) == ("cuda", torch.device("cuda:0"))
    assert open_streams(None, {"ASYNC_LOWVRAM_DEVICE": "cuda:1"}) == ("cuda", torch.device("cuda:1"))
    assert isinstance(open_streams(None, SIMULATED), SimulatedStreams)
    with pytest.raises(UnsupportedDevice, match="only 2"):
        open_streams("cuda:2", {})


def test_zluda_stands_down(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Radeon RX 6600 [ZLUDA]")
    with pytest.raises(UnsupportedDevice, match="ZLUDA"):
        open_streams("cuda:0", {})


@pytest.mark.parametrize(
    "device, reason",
    [
        ("mps", "MPS"),
        ("xpu:0", "XPU"),
        (torch.device("privateuseone:0"), "DirectML"),
        ("cpu", "ASYNC_LOWVRAM_DEVICE"),
        ("cuda", "no CUDA or ROCm"),
        ("meta", "unknown"),
        ("toaster", "not a device"),
    ],
)
def test_unsupported_devices_say_why_in_one_line(no_cuda, device, reason):
    with pytest.raises(UnsupportedDevice, match=reason) as raised:
        open_streams(device, {})
    assert "\n" not in str(raised.value)


def test_a_named_device_that_makes_no_sense_is_no_silent_fallback(no_cuda):
    with pytest.raises(UnsupportedDevice):
        open_streams(None, {"ASYNC_LOWVRAM_DEVICE": "sumilated"})


def test_settings_arrive():
    streams = open_streams(
        "simulated",
        {
            "ASYNC_LOWVRAM_SIM_BANDWIDTH": "5e8",
            "ASYNC_LOWVRAM_SIM_LATENCY": "0.001",
            "ASYNC_LOWVRAM_SIM_JITTER": " 0.002 ",
            "ASYNC_LOWVRAM_SIM_CAPACITY": "1e9",
            "ASYNC_LOWVRAM_SIM_SEED": "7",
            "ASYNC_LOWVRAM_SIM_POISON": "0",
        },
    )
    assert (streams.bandwidth, streams.latency, streams.jitter_seconds) == (5e8, 0.001, 0.002)
    assert (streams.total_memory(), streams.poison) == (10**9, False)
    assert streams.onload_stream.delay() == SimulatedStreams(jitter_seconds=0.002, seed=7).onload_stream.delay()


@pytest.mark.parametrize("text", ["abc", "-5", "nan", "inf", "-inf", "1e999", "0", "", "0x10", "null"])
def test_hostile_values_are_clamped_or_replaced_and_logged(text, caplog):
    names = ["BANDWIDTH", "LATENCY", "JITTER", "CAPACITY", "SEED", "POISON"]
    with caplog.at_level(logging.WARNING, "async_lowvram"):
        streams = open_streams("simulated", {f"ASYNC_LOWVRAM_SIM_{name}": text for name in names})
    assert 1e3 <= streams.bandwidth <= 1e15 and 0 <= streams.latency <= 10 and 0 <= streams.jitter_seconds <= 10
    assert 1 << 20 <= streams.total_memory() <= 1 << 50
    assert bool(caplog.records) == (text != "")
