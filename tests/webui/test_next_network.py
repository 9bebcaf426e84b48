"""The right network is expected at the right time, and its weights are there when its turn comes; with the same pictures."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.webui.host import Host
from lib_async_lowvram.webui.lowvram import Integration
from lib_async_lowvram.webui.next_network import expected_after
from lib_async_lowvram.webui.settings import SettingsReader

NAMES = {"text": "text#2", "unet": "unet#2", "vae_encode": "vae_encode#2", "vae_decode": "vae_decode#2"}
STEPS = 4


def sampling(webui, prepare=None):
    """What a sampler tells the host: a step's number after its first call of the model."""

    def before(step):
        webui.shared.state.sampling_steps = STEPS
        webui.shared.state.sampling_step = max(0, step - 1)
        if prepare is not None:
            prepare()

    return before


def test_what_follows(webui):
    shared = webui.shared
    assert expected_after("text", NAMES, shared) == "unet#2"
    assert expected_after("text", {**NAMES, "text_2": "text_2"}, shared) is None
    assert expected_after("text_2", {**NAMES, "text_2": "text_2"}, shared) is None
    assert expected_after("vae_encode", NAMES, shared) is None
    assert expected_after("vae_decode", NAMES, shared) is None
    assert expected_after("unet", NAMES, shared) is None  # nobody samples
    shared.state.sampling_steps = 20
    told = {step: expected_after("unet", NAMES, shared) for step in range(20) if not setattr(shared.state, "sampling_step", step)}
    assert [step for step, name in told.items() if name] == [17, 18, 19]
    assert set(told.values()) == {None, "vae_decode#2"}
    shared.opts.data["sd_vae_decode_method"] = "TAESD"
    assert expected_after("unet", NAMES, shared) is None
    shared.opts.data["sd_vae_decode_method"] = "Full"
    del shared.state.sampling_steps
    assert expected_after("unet", NAMES, shared) is None
    without = {name: at for name, at in NAMES.items() if not name.startswith("vae")}
    shared.state.sampling_steps = 1
    assert expected_after("unet", without, shared) is None


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_one_picture_expects_each_in_its_turn(webui, recording, kind):
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    recording.mover.calls.clear()
    tiny_models.picture(model, STEPS, before_step=sampling(webui))
    asked = [call for call in recording.mover.calls if call[0] in ("expect", "running")]
    assert asked == [("expect", "unet"), *[("expect", "vae_decode")] * 2, ("running", "vae_decode")]


def test_preparing_keeps_what_was_fetched_for_the_unet_and_nothing_else(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    recording.mover.calls.clear()
    recording.integration.prepare()
    assert recording.mover.calls == [("drain", "unet"), ("prepare", "unet")]


@pytest.fixture
def moving(webui):
    """A started integration whose mover has room for everything."""
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=200e6, latency=1e-5, jitter_seconds=2e-4, seed=3, poison=True)

    def make_mover(config, device):
        mover = AsyncModelMover(OffloadConfig(budget_bytes=8 << 20, small_leaf_bytes=0, check_placement=True), streams)
        mover.configure = lambda config: None
        return mover

    host = Host("1.10.1", False, torch.device("cpu"), True, "simulated")
    integration = Integration.start(host, settings=SettingsReader(environment={}), make_mover=make_mover)
    yield integration
    integration._in_job = False
    integration.close()
    streams.close()


def job(webui, moving, model, prompts):
    """As the host: every prompt a pass of the text encoder, then sampling, then the VAE, then everything off the device."""
    state = webui.shared.state
    state.begin("job")
    try:
        with torch.no_grad():
            for _ in range(prompts - 1):
                model.condition(torch.tensor([[7, 8, 9]]))
            return tiny_models.picture(model, STEPS, before_step=sampling(webui, moving.prepare))
    finally:
        webui.lowvram.send_everything_to_cpu()
        state.end()


@pytest.mark.parametrize("medvram", [False, True])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_pictures_find_the_unet_and_the_vae_there(webui, moving, kind, medvram):
    options = webui.shared.cmd_opts
    options.lowvram, options.medvram = not medvram, medvram
    try:
        model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
        for _ in range(4):
            assert torch.equal(job(webui, moving, model, 3), tiny_models.picture(tiny_models.make(kind), STEPS))
            assert moving.status()["allocated_bytes"] == 0
        status = moving.status()
        assert status["state"] == "active" and status["placement_faults"] == 0, status["last_error"]
        assert status["peak_weight_bytes"] <= 8 << 20
        for name in ("unet", "vae_decode"):
            network = status["networks"][name]
            assert network["adopted_ahead_bytes"] == network["fetched_ahead_bytes"] > 0, name
    finally:
        options.lowvram, options.medvram = True, False
