"""Tiled denoising over the real mover: the same picture, and a group of tiles that ran out of memory is what is repeated."""

from __future__ import annotations

import latent_models
import pytest
import torch
from latent_models import Processing, sample

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.webui.host import Host
from lib_async_lowvram.webui.large_denoise import LargeDenoise
from lib_async_lowvram.webui.lowvram import Integration
from lib_async_lowvram.webui.settings import SettingsReader

CHOSEN = latent_models.small_settings()


@pytest.fixture
def moving(webui):
    """An integration whose mover has some residents and streams the rest; `moving.made(room)`: a picture as a job of the host."""
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=2e9, latency=1e-6, jitter_seconds=1e-5, seed=3, poison=True)
    movers = []

    def make_mover(config, device):
        movers.append(AsyncModelMover(OffloadConfig(budget_bytes=1 << 20, small_leaf_bytes=2048, check_placement=True), streams))
        movers[-1].configure = lambda config: None
        return movers[-1]

    host = Host("1.10.1", False, torch.device("cpu"), True, "simulated")
    integration = Integration.start(host, settings=SettingsReader(environment={}), make_mover=make_mover)
    integration.rooms = 1 << 40
    large = LargeDenoise(lambda model: integration.rooms, integration._models.holding)

    def made(chosen=CHOSEN):
        p = Processing("a cat", "bad")
        webui.shared.state.begin("job")
        large.begin(p, chosen)
        try:
            picture = sample(p)
            integration.sizes = (large.status() or {}).get("sizes")
            return picture
        finally:
            large.end()
            webui.lowvram.send_everything_to_cpu()
            webui.devices.torch_gc()
            webui.shared.state.end()

    integration.made = made
    yield integration
    integration._in_job = False
    integration.close()
    streams.close()


def plain(webui, room):
    """The same picture with all weights where they are, by an equal model that nobody moves."""
    data, large, p = webui.sd_models.model_data, LargeDenoise(lambda model: room), Processing("a cat", "bad")
    before, data.sd_model = data.sd_model, latent_models.make()
    large.begin(p, CHOSEN)
    try:
        return sample(p)
    finally:
        large.end()
        data.sd_model = before


@pytest.mark.parametrize("room", [1 << 40, 400_000], ids=["at once", "in groups and chunks"])
def test_the_same_picture_bit_for_bit(webui, moving, room):
    webui.sd_models.load_model(latent_models.make)
    expected, moving.rooms = plain(webui, room), room
    for _ in range(3):
        assert torch.equal(moving.made(), expected)
    assert (moving.sizes[0]["chunks"] > 1 and moving.sizes[0]["at_once"] < 12) == (room < 1 << 40)
    status = moving.status()
    assert status["state"] == "active" and status["placement_faults"] == 0, status["last_error"]
    assert status["streamed_bytes"] > 0 and status["hits"] > 0 and status["allocated_bytes"] == 0
    unet = status["networks"]["unet"]
    assert unet["learning_passes"] == 1


def test_chunks_stream_no_more_than_one_tile_does(webui, moving, monkeypatch):
    """Each call of the UNet carries its weights once, however many chunks its parts run in, from the first job with chunks on."""
    # Between two passes of a job no other plan: what was measured may be reason for one at any time.
    monkeypatch.setattr("lib_async_lowvram.planning.Planning.better", lambda *_: None)
    webui.sd_models.load_model(latent_models.make)
    for _ in range(2):
        moving.made(latent_models.small_settings("Off"))
    whole = moving.status()
    moving.rooms = 400_000
    for _ in range(2):
        moving.made()
        tiled = moving.status()
        assert moving.sizes[0]["chunks"] > 1 and tiled["networks"]["unet"]["passes"] > whole["networks"]["unet"]["passes"]
        assert (tiled["relearned"], tiled["skipped"]) == (whole["relearned"], whole["skipped"])
        # Whatever the plan: what is not resident travels, once.
        assert tiled["streamed_bytes_per_pass"] + tiled["resident_bytes"] == whole["streamed_bytes_per_pass"] + whole["resident_bytes"]


def test_first_whole_then_in_tiles_then_whole(webui, moving):
    """As hires fix has it: the order of the weights changes twice."""
    model = webui.sd_models.load_model(latent_models.make)
    whole = moving.made(latent_models.small_settings("Off"))
    moving.rooms = 400_000
    expected = plain(webui, 400_000)
    for _ in range(2):
        assert torch.equal(moving.made(), expected)
        assert torch.equal(moving.made(latent_models.small_settings("Off")), whole)
    assert not any("forward" in vars(module) for module in model.modules())
    assert moving.status()["placement_faults"] == 0 and moving.status()["state"] == "active"


def test_a_group_is_repeated_with_fewer_residents_before_it_is_halved(webui, moving):
    model = webui.sd_models.load_model(latent_models.make)
    moving.rooms = 400_000
    expected = moving.made()
    assert torch.equal(moving.made(), expected)
    failing, calls, rows = set(), [], []

    def hungry(module, args):
        calls.append(module)
        if len(calls) in failing:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    unet = model.model.diffusion_model
    unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    unet.out.register_forward_pre_hook(hungry)
    assert torch.equal(moving.made(), expected)
    steady, groups = len(calls), len(rows)

    calls.clear(), rows.clear(), failing.add(2)
    assert torch.equal(moving.made(), expected)
    status = moving.status()
    assert (status["retries"], status["retries_failed"], moving.sizes[0]["halved"]) == (1, 0, 0)
    assert len(rows) == groups + 1 and rows[1] == rows[2] and len(calls) == steady + 1

    calls.clear(), rows.clear(), failing.add(3)
    got = moving.made()
    status = moving.status()
    assert (status["retries"], status["retries_failed"], moving.sizes[0]["halved"]) == (2, 1, 1)
    assert rows[1] == rows[2] and rows[3] == rows[2] // 2 // 2 * 2
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
