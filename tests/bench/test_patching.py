"""The LoRA benchmark: the same bits under every contender, and the counters that its table is about."""

from __future__ import annotations

import json

import pytest
import torch

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench.contenders import Resident
from lib_async_lowvram.bench.lora import Lora
from lib_async_lowvram.bench.patching import EVENTS, PatchingSettings, describe, run_patching
from lib_async_lowvram.bench.unet import sd15
from lib_async_lowvram.device.simulated import SimulatedStreams


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    path = tmp_path_factory.mktemp("patching") / "patching.json"
    made = run_patching(PatchingSettings(device="simulated", rounds=2, channels=16, latent=8, json=path))
    assert json.loads(path.read_text(encoding="utf-8")) == made
    return made


def test_every_contender_gives_the_resident_models_bits(result):
    assert result["bitwise_equal"]
    assert result["compared_passes"] == 3 * (3 + 2 * (2 + len(EVENTS)))


CHANGES = ("first use", "other strength", "removed", "used again")
QUIET = ("steady", "after it", "after removal")


def test_one_write_back_per_changed_unit_per_change_and_none_later(result):
    plain, spared = result["counts"]["async"], result["counts"]["async + masters"]
    for event in CHANGES:
        assert plain[event]["write_backs"] == result["units"], event
        assert spared[event]["write_backs"] == result["layers_patched"], event
    for event in QUIET:
        assert plain[event]["write_backs"] == spared[event]["write_backs"] == 0, event
    for event in EVENTS:
        assert plain[event]["adopted"] == spared[event]["adopted"] == 0


def test_masters_spare_lora_its_own_moves(result):
    stock, plain, spared = (result["counts"][name] for name in ("stock", "async", "async + masters"))
    for event in CHANGES:
        assert plain[event]["lora_bytes"] == stock[event]["lora_bytes"] > 0
    assert stock["first use"]["lora_bytes"] == 2 * stock["used again"]["lora_bytes"]  # backed up and restored
    assert spared["first use"]["lora_bytes"] < 0.01 * stock["first use"]["lora_bytes"]
    assert 0 < spared["removed"]["lora_bytes"] < stock["removed"]["lora_bytes"]
    for event in QUIET:
        assert stock[event]["lora_bytes"] == spared[event]["lora_bytes"] == 0


def test_the_table_names_every_event(result):
    text = describe(result)
    assert all(event in text for event in EVENTS)
    assert "bit for bit equal" in text
    assert "NOT EQUAL" in describe({**result, "bitwise_equal": False})


def test_lora_puts_the_model_back():
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=float("inf"), latency=0.0)
    model = sd15(16, seed=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([1.0]), torch.randn(1, 77, 768))
    with Resident(model, streams) as resident:
        lora = Lora(model, streams)
        plain = resident.run_pass(inputs).clone()
        lora.strength = 0.7
        assert not torch.equal(resident.run_pass(inputs), plain)
        with pytest.raises(RuntimeError, match="only originals"):
            lora.forget_backups()
        lora.strength = None
        assert torch.equal(resident.run_pass(inputs), plain)
        lora.close()
        assert not any("forward" in vars(module) for module in model.modules())
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    streams.close()


def test_the_command(tmp_path, capsys, monkeypatch):
    seen = []

    def run(settings):
        seen.append(settings)
        return {"bitwise_equal": len(seen) == 1}

    monkeypatch.setattr("lib_async_lowvram.bench.patching.run_patching", run)
    arguments = ["bench", "patching", "--device", "simulated", "--rounds", "1", "--seed", "3", "--json", str(tmp_path / "a.json")]
    assert main(arguments) == 0
    assert seen[0] == PatchingSettings(device="simulated", seed=3, rounds=1, json=tmp_path / "a.json")
    assert main(arguments) == 1
    assert "not bit for bit equal" in capsys.readouterr().err
