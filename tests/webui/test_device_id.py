"""`--device-id 3`: the WebUI names cuda:3 and never calls `set_device`, so the current device stays cuda:0. Whoever asks torch
for "the" device asks the wrong one: every device the extension names must carry the index, from detection to the last query.
"""

from __future__ import annotations

import ast
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib_async_lowvram.device import choose
from lib_async_lowvram.device.cuda import CudaStreams
from lib_async_lowvram.webui.host import detect

LIBRARY = Path(__file__).resolve().parent.parent.parent / "lib_async_lowvram"
WANTED = torch.device("cuda:3")

# Functions of torch.cuda that mean the current device unless told otherwise; those without a device are not listed.
OF_A_DEVICE = {
    "Stream", "current_stream", "default_stream", "device", "get_device_name", "get_device_capability", "get_device_properties",
    "max_memory_allocated", "max_memory_reserved", "mem_get_info", "memory_allocated", "memory_reserved", "memory_stats",
    "reset_peak_memory_stats", "synchronize", "set_per_process_memory_fraction", "utilization", "get_rng_state", "set_rng_state",
}
DEVICELESS = {
    "Event", "OutOfMemoryError", "cudart", "current_device", "device_count", "empty_cache", "is_available", "is_initialized", "stream"
}


class Asked:
    """A torch.cuda that writes down for which device everything is asked. The current device is cuda:0."""

    def __init__(self, monkeypatch) -> None:
        self.devices: list[tuple[str, object]] = []
        answers = {"get_device_name": "Fake GPU", "mem_get_info": (1000, 5000)}
        for name in ("get_device_name", "mem_get_info", "memory_reserved", "memory_allocated", "max_memory_allocated", "current_stream",
                     "default_stream", "Stream"):
            monkeypatch.setattr(torch.cuda, name, self._answer(name, answers.get(name, 0)))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "Event", lambda **kwargs: SimpleNamespace(record=lambda stream: None))
        monkeypatch.setattr(torch.cuda, "stream", lambda wanted: nullcontext())
        runtime = SimpleNamespace(cudaHostRegister=lambda *args: 0, cudaHostUnregister=lambda *args: 0)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

        @contextmanager
        def entered(device):
            self.devices.append(("device", device))
            yield

        monkeypatch.setattr(torch.cuda, "device", entered)
        empty = torch.empty

        def fake_empty(*sizes, device=None, **kwargs):
            self.devices.append(("empty", device))
            return empty(*sizes, **kwargs)

        monkeypatch.setattr(torch, "empty", fake_empty)

    def _answer(self, name, answer):
        def ask(device=None):
            self.devices.append((name, device))
            return SimpleNamespace(wait_event=lambda event: None) if name.lower().endswith("stream") else answer

        return ask


def test_from_detection_to_the_last_query(webui, monkeypatch):
    asked = Asked(monkeypatch)
    webui.shared.cmd_opts.device_id = "3"
    webui.devices.device = torch.device("cuda:3")  # as the host makes it of the option
    host = detect({})
    assert host.device == host.mover_device == WANTED and host.device_name.startswith("cuda:3")
    streams = choose.open_streams(host.mover_device, {})
    assert isinstance(streams, CudaStreams) and streams.device == WANTED
    block = streams.allocate(4096)
    streams.current_stream()
    streams.free_memory()
    streams.activation_growth()
    streams.pin(1 << 30, 4096)
    streams.unpin(1 << 30)
    streams.free(block)
    assert {device for _, device in asked.devices} == {WANTED}
    wanted = {"Stream", "current_stream", "default_stream", "empty", "mem_get_info", "memory_allocated", "max_memory_allocated", "device",
              "get_device_name", "memory_reserved"}
    assert {name for name, _ in asked.devices} == wanted


def calls_of_torch_cuda(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.cuda."):
            yield ast.unparse(node.func).removeprefix("torch.cuda."), node


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_nobody_asks_torch_for_the_current_device(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, node in calls_of_torch_cuda(tree):
        where = f"line {node.lineno}: torch.cuda.{name}"
        assert name in OF_A_DEVICE | DEVICELESS, f"{where}: say in this test whether it is of a device"
        assert name in DEVICELESS or node.args or node.keywords, f"{where} without a device"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda", f"line {node.lineno}: .cuda() means the current device"
        if isinstance(node, ast.keyword) and node.arg == "device" and isinstance(node.value, ast.Constant):
            assert node.value.value != "cuda", f"line {node.value.lineno}: a device without index"
