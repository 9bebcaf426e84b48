"""`doctor` on the simulated device, and what it says where there is none. No figure that was measured is judged."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.commands import doctor, machine, probing
from lib_async_lowvram.commands.doctor import describe, examine
from lib_async_lowvram.commands.probing import probe
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device import choose
from lib_async_lowvram.device.simulated import SimulatedStreams


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("ASYNC_LOWVRAM_DEVICE", "ASYNC_LOWVRAM_SIM_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(probing, "REPEATS", 2)
    monkeypatch.setattr(probing, "LAUNCHES", 3)


def simulated(**arguments) -> SimulatedStreams:
    return SimulatedStreams(**{"capacity_bytes": 2 << 30, "bandwidth": 1e10, "latency": 0.0, **arguments})


def test_the_command(tmp_path, capsys):
    out = tmp_path / "doctor.json"
    assert main(["doctor", "--device", "simulated", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    for word in ("versions", "its memory", "pinning", "link, pinned", "automatic budget", "verdict", "Doggettx"):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= 120
    found = json.loads(out.read_text())
    assert found["schema"] == 1 and found["state"] == "active" and found["device"]["simulated"]
    assert found["versions"]["torch"] == torch.__version__
    link = found["measured"]["bandwidth_bytes_per_s"]
    assert set(link) == {"pinned_to_device", "pinned_to_host", "pageable_to_device", "pageable_to_host"}
    assert all(value > 0 for value in link.values())
    assert all(found["measured"][name] > 0 for name in ("launch_seconds", "event_wait_seconds", "kernel_round_trip_seconds"))
    assert "path" not in out.read_text()


def test_the_budget_is_the_mover_s():
    streams = simulated()
    budget = examine(streams, asked_for=True)["budget"]
    streams.close()
    reserve = OffloadConfig().reserve_bytes
    assert budget == {"free_bytes": 2 << 30, "activation_bytes": 0, "reserve_bytes": reserve, "budget_bytes": (2 << 30) - reserve}


def test_nothing_is_kept():
    streams = simulated()
    probe(streams)
    assert streams.allocated_bytes == 0
    streams.close()


def test_pinning_refused():
    streams = simulated(pinning="none")
    found = examine(streams, asked_for=True)
    streams.close()
    assert found["measured"]["pinning_works"] is False
    link = found["measured"]["bandwidth_bytes_per_s"]
    assert link["pinned_to_device"] is None and link["pageable_to_device"] > 0
    assert any("could not be pinned" in warning for warning in found["warnings"])
    printed = describe(found)
    assert "REFUSED" in printed and "not possible to the device" in printed and "at least" in printed  # SDXL, at the pageable speed


def test_no_memory_left():
    streams = simulated(capacity_bytes=1 << 20)
    found = examine(streams, asked_for=True)
    streams.close()
    assert found["measured"]["bandwidth_bytes_per_s"] is None and found["budget"]["budget_bytes"] == 0
    printed = describe(found)
    assert (
        "not measured" in printed and "not tried" in printed and "too little memory is free" in printed and "reserve of 1024 MB" in printed
    )


def test_memory_that_goes_meanwhile(monkeypatch):
    streams = simulated()
    monkeypatch.setattr(streams._memory, "allocate", lambda nbytes: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("gone\nmore")))
    found = probe(streams)
    assert found["bandwidth_bytes_per_s"] is None and found["problems"] == ["the link could not be measured: gone"]
    streams.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_stands_down(monkeypatch, capsys):
    assert main(["doctor"]) == 0
    assert "standing down: torch finds no CUDA or ROCm device" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(doctor, "_other_devices", lambda: ["mps"])
    assert main(["doctor"]) == 0
    assert "standing down: MPS: host and device share their memory" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setenv("ASYNC_LOWVRAM_DEVICE", "simulated")
    assert main(["doctor"]) == 0
    assert "verdict           active" in capsys.readouterr().out


def test_an_old_torch(monkeypatch):
    monkeypatch.setattr(machine, "torch_is_too_old", lambda: True)
    streams = simulated()
    found = examine(streams, asked_for=True)
    streams.close()
    assert found["state"] == "standing_down" and "too old" in found["reason"]


@pytest.mark.parametrize("device", ["mps", "xpu", "cpu", "nonsense", "cuda:99", ""])
def test_devices_that_cannot_be_used(device, capsys):
    assert main(["doctor", "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_driver_that_does_not_start(monkeypatch, capsys):
    monkeypatch.setattr(choose, "open_streams", lambda device: (_ for _ in ()).throw(RuntimeError("CUDA unknown error\nstack")))
    assert main(["doctor", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: cuda cannot be used: CUDA unknown error\n"


def test_what_is_told_of_a_cuda_device(monkeypatch):
    """With torch's answers made up: there is none here to ask."""

    class Streams:
        name, device = "cuda:1 A Card", torch.device("cuda", 1)

        def free_memory(self):
            return 3 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "12.1")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    device = machine.describe_device(Streams())
    assert (device["total_bytes"], device["free_bytes"], device["simulated"]) == (8 << 30, 3 << 30, False)
    assert doctor._more(device) == " (compute capability 8.6, driver for CUDA 12.4, one of 2 devices)"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.describe_device(Streams())["driver_cuda"] is None


def test_containers_and_wsl(tmp_path, monkeypatch):
    monkeypatch.delenv("WSL_DISTRO_NAME", raising=False)
    linux = sys.platform.startswith("linux")
    assert machine.is_wsl("5.15.90.1-microsoft-standard-WSL2") == linux
    assert not machine.is_wsl("6.1.0-18-amd64")
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "some").write_text("1048576\n")
    files = [str(tmp_path / name) for name in ("missing", "max", "some")]
    assert machine._container_limit_bytes(tuple(files)) == 1 << 20
    assert machine._container_limit_bytes(tuple(files[:2])) is None
    streams = simulated()
    monkeypatch.setattr(machine, "_container_limit_bytes", lambda: 1 << 20)
    found = examine(streams, asked_for=True)
    streams.close()
    assert found["host"]["container_limit_bytes"] == 1 << 20
    assert any("this process may use 1 MB" in warning for warning in found["warnings"])


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    assert main(["doctor", "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert "compute capability" in printed and "verdict           active" in printed and "link, pinned" in printed
