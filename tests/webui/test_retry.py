"""Out of memory inside a UNet pass: the pass is repeated with less for weights, to the same pixels, or fails as under stock."""

from __future__ import annotations

import gc
import logging
import random
import sys
import types
import weakref
from contextlib import contextmanager

import numpy
import pytest
import tiny_models
import torch
from test_with_the_mover import KINDS, Interrupt, expected, job, moving, worked  # noqa: F401
from torch import nn

from lib_async_lowvram.webui import lora as lora_patches
from lib_async_lowvram.webui.memory_errors import DOGGETTX
from lib_async_lowvram.webui.retry import Inputs
from lib_async_lowvram.webui.settings import ENABLED
from tests.lora_double import LoraDouble, Network

PARTS = {
    "first": lambda unet: unet.time_embed[0],
    "input": lambda unet: unet.input_blocks[1].norm,
    "middle": lambda unet: unet.middle_block.shrink,
    "output": lambda unet: unet.output_blocks[2].grow,
    "out": lambda unet: unet.out,
}


class Hungry:
    """Computing, in front of one module, that needs all memory that is free and a little more, in one pass: a hook on it. With
    `give_up`, it does not even try when that is not free, as Doggettx does."""

    def __init__(self, integration, module, *, at=2, give_up=False, always=False):
        self.integration, self.at, self.give_up, self.always = integration, at, give_up, always
        self.calls = self.failed = self.needed = 0
        self.streams = None
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.calls += 1
        if self.calls < self.at or (self.calls > self.at + 1 and not self.always):
            return
        if self.streams is None:
            self.streams = self.integration.movers[-1].streams.sibling()  # with books of its own
        streams = self.streams
        if self.calls == self.at or self.always:
            self.needed = streams.free_memory() + 512
        if self.give_up and self.needed > streams.free_memory():
            self.failed += 1
            raise RuntimeError(f"{DOGGETTX} (max approx. 448x448). Need: 1.2GB free, Have:0.5GB free")
        try:
            streams.free(streams.allocate(self.needed))
        except torch.cuda.OutOfMemoryError:
            self.failed += 1
            raise


@pytest.fixture
def lines(caplog):
    """What the seam logged."""
    caplog.set_level(logging.INFO, logger="async_lowvram")
    return lambda: [record.getMessage() for record in caplog.records if "UNet pass" in record.getMessage()]


def managed(webui, kind="sd1"):
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    for _ in range(2):
        assert torch.equal(job(webui, model), expected(kind))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("give_up", [False, True], ids=["torch", "Doggettx"])
def test_the_picture_is_the_same(webui, moving, lines, kind, part, give_up):  # noqa: F811
    model = managed(webui, kind)
    hungry = Hungry(moving, PARTS[part](model.model.diffusion_model), give_up=give_up)
    assert torch.equal(job(webui, model), expected(kind))
    assert (hungry.failed, hungry.calls) == (1, 5)
    status = worked(moving, undisturbed=False)
    assert (status["retries"], status["retries_failed"], status["sheds"]) == (1, 0, 1)
    assert status["last_error"].startswith("RuntimeError: Not enough" if give_up else "OutOfMemoryError: CUDA out of memory")
    assert len(lines()) == 1 and "tried again" in lines()[0]
    before = status["streamed_bytes"]
    for _ in range(2):
        assert torch.equal(job(webui, model), expected(kind))
    status = worked(moving, undisturbed=False)
    assert status["retries"] == 1 and status["streamed_bytes"] > before


def test_less_is_held_until_the_job_ends(webui, moving):  # noqa: F811
    model = managed(webui)
    held = []
    model.model.diffusion_model.out.register_forward_hook(lambda *_: held.append(moving.movers[-1].streams.allocated_bytes))
    job(webui, model)
    usual = max(held)
    held.clear()
    Hungry(moving, model.model.diffusion_model.middle_block)
    job(webui, model)
    assert held[0] == usual and max(held[1:]) < usual
    held.clear()
    job(webui, model)
    assert max(held) == usual


@pytest.mark.parametrize("give_up", [False, True], ids=["torch", "Doggettx"])
def test_a_pass_that_fails_again_fails_as_under_stock(webui, moving, lines, give_up):  # noqa: F811
    model = managed(webui)
    hungry = Hungry(moving, model.model.diffusion_model.middle_block.norm, give_up=give_up, always=True)
    with pytest.raises(RuntimeError) as raised:
        job(webui, model)
    assert type(raised.value) is (RuntimeError if give_up else torch.cuda.OutOfMemoryError)
    assert str(raised.value).startswith(DOGGETTX if give_up else "CUDA out of memory. Tried to allocate")
    assert raised.value.__context__ is None
    assert hungry.failed == 2
    hungry.handle.remove()
    assert len(lines()) == 2 and "failed again" in lines()[1]
    for _ in range(2):
        assert torch.equal(job(webui, model), expected("sd1"))
    status = worked(moving, undisturbed=False)
    assert (status["retries"], status["retries_failed"], status["state"]) == (1, 1, "active")


def test_in_a_learning_pass_there_is_nothing_to_give_up(webui, moving, lines):  # noqa: F811
    model = webui.sd_models.load_model(lambda: tiny_models.make("sd1"))
    hungry = Hungry(moving, model.model.diffusion_model.middle_block, at=1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        job(webui, model)
    assert hungry.failed == 1 and len(lines()) == 1 and "nothing to give up" in lines()[0]
    hungry.handle.remove()
    for _ in range(3):
        assert torch.equal(job(webui, model), expected("sd1"))
    worked(moving, undisturbed=False)


@pytest.mark.parametrize("error", [ValueError("shape"), RuntimeError("size mismatch"), Interrupt()], ids=lambda error: type(error).__name__)
def test_other_errors_pass_through_at_once(webui, moving, lines, error):  # noqa: F811
    model = managed(webui)
    calls = []

    def fail(module, args):
        calls.append(module)
        raise error

    handle = model.model.diffusion_model.middle_block.register_forward_pre_hook(fail)
    with pytest.raises(type(error)) as raised:
        job(webui, model)
    assert raised.value is error and len(calls) == 1 and not lines()
    handle.remove()
    assert torch.equal(job(webui, model), expected("sd1"))
    assert worked(moving, undisturbed=False)["retries"] == 0


# -- what is repeated ------------------------------------------------------------------------------------------------------
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
def test_what_draws_inside_draws_the_same(webui, moving, monkeypatch, at):  # noqa: F811
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


def test_containers_are_put_back(webui, moving):  # noqa: F811
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


def test_an_input_that_was_written_to_forbids_it(webui, moving, lines):  # noqa: F811
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


def test_with_gradients_nothing_is_repeated(webui, moving, lines):  # noqa: F811
    model = managed(webui)
    hungry = Hungry(moving, model.model.diffusion_model.out, at=1)
    x = torch.randn(2, tiny_models.WIDTH)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        model.apply_model(x, x, {"c_crossattn": [x]})
    assert hungry.calls == 1 and not lines()


def test_what_the_first_try_computed_is_gone_before_the_second(webui, moving):  # noqa: F811
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


# -- LoRA ------------------------------------------------------------------------------------------------------------------
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
def test_a_layer_that_could_not_be_patched(webui, moving, monkeypatch, part, tries):  # noqa: F811
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


def test_memory_that_runs_out_between_two_layers_patches_none_twice(webui, moving, monkeypatch):  # noqa: F811
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


def test_other_errors_in_a_layer_are_counted_as_ever(webui, moving, monkeypatch, lines):  # noqa: F811
    def misfit(self, layer, which, weight):
        raise RuntimeError("The size of tensor a (16) must match the size of tensor b (64)")

    monkeypatch.setattr(Network, "updown", misfit)
    with lora_extension(monkeypatch) as lora:
        model = managed(webui)
        lora.name_layers(model)
        lora.want(Network("one"))
        assert torch.equal(job(webui, model), expected("sd1"))
        assert lora.extra_network_lora.errors["one"] > 0 and type(lora.extra_network_lora.errors) is dict and not lines()


# -- off ---------------------------------------------------------------------------------------------------------------------
def test_the_method_is_given_back(webui, moving):  # noqa: F811
    stock = vars(tiny_models.Model)["apply_model"]
    model = managed(webui)
    assert vars(tiny_models.Model)["apply_model"] is not stock
    webui.data[ENABLED] = False
    job(webui, model)
    assert vars(tiny_models.Model)["apply_model"] is stock
    webui.data[ENABLED] = True
    job(webui, model)
    assert vars(tiny_models.Model)["apply_model"] is not stock
    moving.movers[-1].demote("told to")
    assert vars(tiny_models.Model)["apply_model"] is stock
    assert torch.equal(job(webui, model), expected("sd1"))


def test_somebody_over_ours_keeps_theirs(webui, moving, monkeypatch):  # noqa: F811
    stock = vars(tiny_models.Model)["apply_model"]
    model = managed(webui)
    ours, calls = vars(tiny_models.Model)["apply_model"], []

    def theirs(self, *args):
        calls.append(1)
        return ours(self, *args)

    monkeypatch.setattr(tiny_models.Model, "apply_model", theirs)
    hungry, wanted = Hungry(moving, model.model.diffusion_model.out), expected("sd1")
    calls.clear()
    assert torch.equal(job(webui, model), wanted)
    assert len(calls) == 4 and hungry.calls == 5
    moving.close()
    assert vars(tiny_models.Model)["apply_model"] is theirs and ours.handler is None
    assert torch.equal(job(webui, model), expected("sd1"))
    monkeypatch.setattr(tiny_models.Model, "apply_model", stock)


def test_models_that_are_not_managed_pass_through(webui, moving, lines):  # noqa: F811
    managed(webui)
    other = tiny_models.make("sd1")
    other.model.diffusion_model.out.register_forward_pre_hook(Hungry(moving, nn.Identity(), at=1))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        tiny_models.picture(other)
    assert not lines() and moving.status()["retries"] == 0
