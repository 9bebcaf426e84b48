"""Checkpoints switched in place, kept, thrown away, and VAEs in another precision, over the real mover: same pictures as stock."""

from __future__ import annotations

import copy
import threading

import pytest
import tiny_models
import torch
from moving_rig import KINDS, expected, job, worked


def test_in_place_checkpoint_switch(webui, moving):
    model = webui.sd_models.load_model(tiny_models.make)
    job(webui, model)
    job(webui, model)
    other = tiny_models.make(seed=7)
    webui.sd_models.load_weights_in_place(model, other.state_dict())
    for _ in range(2):
        assert torch.equal(job(webui, model), tiny_models.picture(other))
    worked(moving)


def test_checkpoint_switch_between_two_steps_as_the_refiner_does(webui, moving):
    plain = tiny_models.make()
    base, refiner = copy.deepcopy(plain.state_dict()), tiny_models.make(seed=7).state_dict()

    def switching(switch):
        return lambda step: switch(base if step == 0 else refiner) if step in (0, 2) else None

    wanted = tiny_models.picture(plain, before_step=switching(lambda state: plain.load_state_dict(state)))
    model = webui.sd_models.load_model(tiny_models.make)
    for _ in range(3):
        webui.sd_models.load_weights_in_place(model, base)
        got = job(webui, model, before_step=switching(lambda state: webui.sd_models.load_weights_in_place(model, state)))
        assert torch.equal(got, wanted)
    worked(moving)


def test_vae_in_another_precision(webui, moving):
    def doubled(model):
        model.first_stage_model.to(torch.float64)
        return model

    def decode(model):
        with torch.no_grad():
            return model.first_stage_model.decode(torch.ones(1, tiny_models.WIDTH, dtype=torch.float64))

    model = webui.sd_models.load_model(tiny_models.make)
    job(webui, model)
    job(webui, model)
    doubled(model)
    wanted = decode(doubled(tiny_models.make()))
    for _ in range(3):
        assert torch.equal(decode(model), wanted)


def test_models_kept_in_memory(webui, moving):
    first = webui.sd_models.load_model(tiny_models.make)
    job(webui, first)
    second = webui.sd_models.load_beside(lambda: tiny_models.make("sdxl", seed=2))
    for _ in range(2):
        assert torch.equal(job(webui, second), tiny_models.picture(tiny_models.make("sdxl", seed=2)))
        webui.sd_models.use_loaded(first)
        assert torch.equal(job(webui, first), expected("sd1"))
        webui.sd_models.use_loaded(second)
    worked(moving)


def test_thrown_away_and_loaded_anew(webui, moving):
    for kind in [*KINDS, "sd1"]:
        model = webui.sd_models.load_model(lambda kind=kind: tiny_models.make(kind))
        for _ in range(2):
            assert torch.equal(job(webui, model), expected(kind))
    worked(moving)
    assert len(moving.status()["networks"]) == 4
    assert len(moving.movers) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_changed_by_another_thread_right_after_loading(webui, moving, kind):
    """As an option changed over HTTP does it, after the empty prompt was encoded on the loading thread."""

    loader = threading.Thread(target=lambda: webui.sd_models.load_model(lambda: tiny_models.make(kind)))
    loader.start()
    loader.join()
    model = webui.sd_models.model_data.sd_model
    other = tiny_models.make(kind, seed=7)
    webui.sd_models.load_weights_in_place(model, other.state_dict())
    for _ in range(3):
        assert torch.equal(job(webui, model), tiny_models.picture(other))
