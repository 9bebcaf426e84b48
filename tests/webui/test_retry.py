"""Out of memory inside a UNet pass: the pass is repeated with less for weights, to the same pixels, or fails as under stock."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from moving_rig import KINDS, Interrupt, expected, job, worked
from retry_rig import Hungry, managed
from torch import nn

from lib_async_lowvram.webui.memory_errors import DOGGETTX
from lib_async_lowvram.webui.settings import ENABLED

PARTS = {
    "first": lambda unet: unet.time_embed[0],
    "input": lambda unet: unet.input_blocks[1].norm,
    "middle": lambda unet: unet.middle_block.shrink,
    "output": lambda unet: unet.output_blocks[2].grow,
    "out": lambda unet: unet.out,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("give_up", [False, True], ids=["torch", "Doggettx"])
def test_the_picture_is_the_same(webui, moving, lines, kind, part, give_up):
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


def test_less_is_held_until_the_job_ends(webui, moving):
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
def test_a_pass_that_fails_again_fails_as_under_stock(webui, moving, lines, give_up):
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


def test_in_a_learning_pass_there_is_nothing_to_give_up(webui, moving, lines):
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
def test_other_errors_pass_through_at_once(webui, moving, lines, error):
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


def test_the_method_is_given_back(webui, moving):
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


def test_somebody_over_ours_keeps_theirs(webui, moving, monkeypatch):
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


def test_models_that_are_not_managed_pass_through(webui, moving, lines):
    managed(webui)
    other = tiny_models.make("sd1")
    other.model.diffusion_model.out.register_forward_pre_hook(Hungry(moving, nn.Identity(), at=1))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        tiny_models.picture(other)
    assert not lines() and moving.status()["retries"] == 0
