"""Which hosts we work in, and the one line we stand down with on all others."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib_async_lowvram.webui.host import DEVICE_VARIABLE, SIMULATED, Host, StandDown, detect

ON_SIMULATED = {DEVICE_VARIABLE: SIMULATED}


def reason(environment=ON_SIMULATED) -> str:
    found = detect(environment)
    assert isinstance(found, StandDown), found
    assert "\n" not in found.reason
    return found.reason


def test_a_known_host_on_the_simulated_device(webui):
    found = detect(ON_SIMULATED)
    assert found == Host("1.10.1", False, torch.device("cpu"), True, SIMULATED)
    assert found.mover_device == SIMULATED


@pytest.mark.parametrize(
    ("tag", "version", "best_effort"),
    [
        ("v1.10.1", "1.10.1", False),
        ("1.10.0", "1.10.0", False),
        ("v1.10.1-17-g82a973c", "1.10.1", False),
        ("v1.9.4", "1.9.4", True),
        ("1.7.0", "1.7.0", True),
    ],
)
def test_versions_we_know(webui, tag, version, best_effort):
    webui.launch_utils.tag = tag
    found = detect(ON_SIMULATED)
    assert (found.version, found.best_effort) == (version, best_effort)


@pytest.mark.parametrize("tag", ["v1.6.1", "v1.11.0", "v2.0.0", "<none>", None, "f0.0.17v1.8.0rc", ""])
def test_versions_we_do_not_know(webui, tag):
    webui.launch_utils.tag = tag
    assert "known are 1.10.x" in reason()


def test_forge(webui, monkeypatch):
    forge = ModuleType("modules_forge")
    forge.__spec__ = SimpleNamespace(name="modules_forge")
    monkeypatch.setitem(sys.modules, "modules_forge", forge)
    assert "Forge" in reason()


def test_no_webui_at_all():
    assert "modules.lowvram" in reason()


def test_a_fork_without_the_functions(webui):
    del webui.lowvram.send_everything_to_cpu
    assert "send_everything_to_cpu" in reason()


@pytest.mark.parametrize("change", [lambda options: setattr(options, "lowvram", False), lambda options: delattr(options, "lowvram")])
def test_without_lowvram(webui, change):
    change(webui.shared.cmd_opts)
    assert "--lowvram" in reason()


@pytest.mark.parametrize(
    ("device", "word"),
    [("mps", "MPS"), ("xpu", "XPU"), ("privateuseone:0", "DirectML"), ("cpu", "CPU"), ("meta", "meta")],
)
def test_devices_we_cannot_drive(webui, device, word):
    webui.devices.device = torch.device(device)
    assert word in reason({})


def test_cuda_gets_its_index(webui, monkeypatch):
    webui.devices.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    found = detect({})
    assert (found.device, found.simulated, found.device_name) == (torch.device("cuda:1"), False, "cuda:1 NVIDIA Test")
    assert found.mover_device == torch.device("cuda:1")


def test_device_id_is_kept(webui, monkeypatch):
    webui.devices.device = torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    assert detect({}).device == torch.device("cuda:3")


def test_zluda(webui, monkeypatch):
    webui.devices.device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Radeon [ZLUDA]")
    assert "ZLUDA" in reason({})


def test_simulated_next_to_a_gpu(webui):
    webui.devices.device = torch.device("cuda:0")
    assert "--use-cpu all" in reason()


def test_a_device_nobody_knows(webui):
    assert "'tpu'" in reason({DEVICE_VARIABLE: "tpu"})


def test_no_device_chosen_yet(webui):
    webui.devices.device = None
    assert "not chosen" in reason()


def test_a_failing_look_is_a_reason(webui, monkeypatch):
    webui.devices.device = torch.device("cuda:0")

    def broken(device):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    assert "driver too old" in reason({})
