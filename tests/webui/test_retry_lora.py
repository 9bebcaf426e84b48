"""A LoRA layer that could not be patched for want of memory is patched when the pass is repeated, and none is patched twice."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

import pytest
import tiny_models
import torch
from moving_rig import expected, job
from retry_rig import Hungry, managed

from lib_async_lowvram.webui import lora as lora_patches
from tests.lora_double import LoraDouble, Network


@contextmanager
def lora_extension(monkeypatch):
    """The double, and as much of the extension's module as is looked at."""
    with LoraDouble() as double:
        networks = types.ModuleType(lora_patches.MODULE)
        networks.extra_network_lora = double.extra_network_lora
        networks.loaded_networks = [object()]
        monkeypatch.setitem(sys.modules, lora_patches.MODULE, networks)
        yield double


BROKEN = "model.diffusion_model.input_blocks.2.grow"


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("tries", [1, 2])
def test_a_layer_that_could_not_be_patched(webui, moving, monkeypatch, part, tries):
    """Once: it is patched when the pass is repeated. Twice: the host goes on without, as it does under stock."""
    networks = [Network("one"), Network("two", biased=lambda name: True)]
    updown, left = Network.updown, []

    def starving(self, layer, which, weight):
        if left and layer == BROKEN and (self.name, which) == ("two", part):
            left.pop()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return updown(self, layer, which, weight)

    monkeypatch.setattr(Network, "updown", starving)
    with lora_extension(monkeypatch) as lora:
        model, twin = managed(webui), tiny_models.make("sd1")
        lora.name_layers(model, twin)
        errors = lora.extra_network_lora.errors
        lora.want(*networks)
        left[:] = [1] * (tries - 1)
        wanted = tiny_models.picture(twin)
        assert errors == ({"two": 1} if tries == 2 else {})
        errors.clear()
        left[:] = [1] * tries
        assert torch.equal(job(webui, model), wanted)
        assert not left
        assert lora.extra_network_lora.errors is errors and errors == ({"two": 1} if tries == 2 else {})
        assert moving.status()["retries"] == 1
        for wish in ((), networks):  # what the mover wrote back was right
            lora.want(*wish)
            assert torch.equal(job(webui, model), tiny_models.picture(twin))
        for (name, mine), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), name


def test_memory_that_runs_out_between_two_layers_patches_none_twice(webui, moving, monkeypatch):
    with lora_extension(monkeypatch) as lora:
        model, twin = managed(webui), tiny_models.make("sd1")
        lora.name_layers(model, twin)
        lora.want(Network("one"))
        wanted = tiny_models.picture(twin)
        applied = lora.applied
        hungry = Hungry(moving, model.model.diffusion_model.output_blocks[0].shrink, at=1)
        assert torch.equal(job(webui, model), wanted)
        assert hungry.failed == 1 and lora.applied == 2 * applied
        lora.want()
        assert torch.equal(job(webui, model), expected("sd1"))
        for (name, mine), theirs in zip(model.state_dict().items(), tiny_models.make("sd1").state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), name


def test_other_errors_in_a_layer_are_counted_as_ever(webui, moving, monkeypatch, lines):
    def misfit(self, layer, which, weight):
        raise RuntimeError("The size of tensor a (16) must match the size of tensor b (64)")

    monkeypatch.setattr(Network, "updown", misfit)
    with lora_extension(monkeypatch) as lora:
        model = managed(webui)
        lora.name_layers(model)
        lora.want(Network("one"))
        assert torch.equal(job(webui, model), expected("sd1"))
        assert lora.extra_network_lora.errors["one"] > 0 and type(lora.extra_network_lora.errors) is dict and not lines()
