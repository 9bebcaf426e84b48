"""A UNet pass that is repeated draws the same random numbers and is given the same inputs, or is not repeated."""

from __future__ import annotations

import gc
import random
import sys
import types
import weakref

import numpy
import pytest
import tiny_models
import torch
from moving_rig import expected, job
from retry_rig import Hungry, managed
from torch import nn

from lib_async_lowvram.webui.retry import Inputs


class Drawing(nn.Module):
    """Adds numbers of every generator there is."""

    def __init__(self, merging):
        super().__init__()
        self.merging = merging

    def forward(self, x):
        merging = self.merging["args"]
        if merging["generator"] is None:
            merging["generator"] = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
        drawn = torch.randn(x.shape[-1]) + random.random() + numpy.random.rand() + sys.modules["hypertile"].RNG_INSTANCE.randint(0, 9)
        noise = torch.randn(x.shape[-1], generator=merging["generator"])
        rng = sys.modules["modules.rng"]
        fake = rng.nv_rng = types.SimpleNamespace(seed=1, offset=rng.nv_rng.offset + 1)
        return x + drawn + noise + fake.offset


def seed_everything(monkeypatch, unet):
    rng, hypertile = types.ModuleType("modules.rng"), types.ModuleType("hypertile")
    rng.nv_rng = types.SimpleNamespace(seed=1, offset=0)
    hypertile.RNG_INSTANCE = random.Random(7)
    monkeypatch.setitem(sys.modules, "modules.rng", rng)
    monkeypatch.setitem(sys.modules, "hypertile", hypertile)
    unet._tome_info = {"args": {"generator": None}}
    unet.out = nn.Sequential(unet.out, Drawing(unet._tome_info))
    torch.manual_seed(3)
    random.seed(4)
    numpy.random.seed(5)


@pytest.mark.parametrize("at", [2, 3])
def test_what_draws_inside_draws_the_same(webui, moving, monkeypatch, at):
    plain = tiny_models.make("sd1")
    seed_everything(monkeypatch, plain.model.diffusion_model)
    wanted = tiny_models.picture(plain)
    model = managed(webui)
    seed_everything(monkeypatch, model.model.diffusion_model)
    state = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()]
    job(webui, model)  # learns anew
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    numpy.random.seed(5)
    sys.modules["hypertile"].RNG_INSTANCE.seed(7)
    sys.modules["modules.rng"].nv_rng.offset = 0
    model.model.diffusion_model._tome_info["args"]["generator"] = None
    # Behind everything that draws.
    hungry = Hungry(moving, model.model.diffusion_model, at=at)
    hungry.handle.remove()
    model.model.diffusion_model.out[1].register_forward_hook(lambda module, args, output: hungry(module, args))
    assert torch.equal(job(webui, model), wanted)
    assert hungry.failed == 1 and moving.status()["retries"] == 1


def test_containers_are_put_back(webui, moving):
    model = managed(webui)
    Hungry(moving, model.model.diffusion_model.out)
    apply = type(model).apply_model

    def taking(self, x, t, cond):  # as an extension inside the seam might, and the host's own casts do
        context = cond.pop("c_crossattn")
        return apply.__wrapped__(self, x, t, {"c_crossattn": [context.pop()]})

    webui.shared.state.begin("job")
    given, wanted = [], expected("sd1")
    handler = apply.handler
    apply.handler = lambda stock, *args: handler(lambda *same: (given.append(1), taking(*same))[1], *args)
    try:
        assert torch.equal(tiny_models.picture(model), wanted)
    finally:
        apply.handler = handler
        webui.shared.state.end()
    assert len(given) == 5 and moving.status()["retries"] == 1


def test_an_input_that_was_written_to_forbids_it(webui, moving, lines):
    model = managed(webui)
    Hungry(moving, model.model.diffusion_model.out)

    def write(module, args):
        args[0].mul_(1.0)

    handle = model.model.register_forward_pre_hook(write)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        job(webui, model)
    handle.remove()
    assert not lines() and moving.status()["retries"] == 0
    assert torch.equal(job(webui, model), expected("sd1"))


def test_inputs_know_tensors_wherever_they_are():
    inside, alone = torch.zeros(2), torch.zeros(2)
    cond = {"a": [inside, "text"], "b": (alone,)}
    inputs = Inputs((cond,), {"flag": True})
    assert inputs.unwritten
    alone.add_(1)
    assert not inputs.unwritten
    with torch.inference_mode():
        assert not Inputs((torch.zeros(1),)).unwritten  # nobody counts what is written to it
    cond["a"].clear()
    del cond["b"]
    inputs.put_back()
    assert cond["a"][0] is inside and cond["a"][1] == "text" and cond["b"][0] is alone


def test_with_gradients_nothing_is_repeated(webui, moving, lines):
    model = managed(webui)
    hungry = Hungry(moving, model.model.diffusion_model.out, at=1)
    x = torch.randn(2, tiny_models.WIDTH)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.apply_model(x, x, {"c_crossattn": [x]})
    assert hungry.calls == 1 and not lines()


def test_what_the_first_try_computed_is_gone_before_the_second(webui, moving):
    model = managed(webui)
    hungry, computed, alive = Hungry(moving, model.model.diffusion_model.out), [], []

    def look(module, args):
        alive.append(any(ref() is not None for ref in computed))
        computed.append(weakref.ref(args[0]))

    gc.disable()
    try:
        model.model.diffusion_model.middle_block.register_forward_pre_hook(look)
        job(webui, model)
    finally:
        gc.enable()
    assert hungry.failed == 1 and len(alive) == 5 and not any(alive)
