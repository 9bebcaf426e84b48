"""How the peers are called, on stand-ins for their packages, and whose device memory is whose, on a stand-in for the counters."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lib_async_lowvram.bench import peers
from lib_async_lowvram.bench.contenders import weight_bytes
from lib_async_lowvram.bench.memory import DeviceMemory
from lib_async_lowvram.bench.unet import sd15

STREAMS = SimpleNamespace(device=torch.device("cuda", 0))


def stand_in(monkeypatch, name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(("name", "record"), [("diffusers-group", False), ("diffusers-group-record", True)])
def test_group_offloading_is_asked_for_leaves_and_a_stream(name, record, monkeypatch):
    calls = []
    stand_in(monkeypatch, "diffusers")
    stand_in(monkeypatch, "diffusers.hooks", apply_group_offloading=lambda module, **given: calls.append((module, given)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(calls.append(device)))
    model = sd15(8)
    peer = peers.make_peer(name, model, STREAMS)
    peer.setup()
    assert peer.name == name and peer.pinned_bytes() == weight_bytes(model)
    assert calls == [
        STREAMS.device,
        (
            model,
            {
                "onload_device": STREAMS.device,
                "offload_device": torch.device("cpu"),
                "offload_type": "leaf_level",
                "use_stream": True,
                "record_stream": record,
            },
        ),
    ]
    peer.close()
    assert not list(peer.model.parameters())  # nothing keeps the model's hooks and what they hold


def test_mmgp_is_asked_not_to_change_the_weights_and_leaves_the_process_as_it_was(monkeypatch):
    calls, defaults = [], []

    def profile_all(modules, **given):
        calls.append((modules, given))
        return SimpleNamespace(release=lambda: calls.append("released"))

    offload = stand_in(monkeypatch, "mmgp.offload", all=profile_all)
    stand_in(monkeypatch, "mmgp", offload=offload)
    monkeypatch.setattr(torch, "set_default_device", defaults.append)
    model = sd15(8)
    peer = peers.make_peer("mmgp", model, STREAMS)
    peer.setup()
    ((modules, given),) = calls
    assert modules == {"unet": model} and given["quantizeTransformer"] is False and given["pinnedMemory"] is True
    assert given["budgets"] == {"unet": max(1, int(0.25 * weight_bytes(model) / 2**20))}  # a plain number is not read
    assert defaults == [None]
    peer.close()
    peer.close()
    assert calls[1:] == ["released"]


def test_mmgp_that_fails_leaves_the_process_as_it_was(monkeypatch):
    defaults = []

    def profile_all(modules, **given):
        raise TypeError("unexpected keyword")

    offload = stand_in(monkeypatch, "mmgp.offload", all=profile_all)
    stand_in(monkeypatch, "mmgp", offload=offload)
    monkeypatch.setattr(torch, "set_default_device", defaults.append)
    peer = peers.make_peer("mmgp", sd15(8), STREAMS)
    with pytest.raises(TypeError):
        peer.setup()
    peer.close()
    assert defaults == [None]


class Counters:
    """torch's counters of a device, of the whole process."""

    def __init__(self, monkeypatch) -> None:
        self.now = self.most = 0
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.take(0))

    def take(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = self.now if nbytes == 0 else max(self.most, self.now)


def test_everybody_is_charged_with_their_own_memory(monkeypatch):
    counters = Counters(monkeypatch)
    counters.take(7)  # somebody else's
    first, second = DeviceMemory(STREAMS), DeviceMemory(STREAMS)
    with first.turn():
        counters.take(100)
        counters.take(-10)
    assert (first.held, first.peak) == (90, 100)
    with second.turn():
        counters.take(30)
        counters.take(-30)
    assert (second.held, second.peak) == (0, 30)
    with first.turn():
        counters.take(5)
        counters.take(-80)
    assert (first.held, first.peak) == (15, 95)
    with pytest.raises(ValueError), first.turn():
        counters.take(1)
        raise ValueError
    assert first.held == 16


def test_nobody_counts_on_the_simulated_device():
    memory = DeviceMemory(SimpleNamespace(device=torch.device("cpu")))
    with memory.turn():
        pass
    assert (memory.held, memory.peak) == (0, None)
