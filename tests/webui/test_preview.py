"""Live previews of the host on the preview worker: when one is due, what it shows, and that the host's own come back."""

from __future__ import annotations

import threading

import pytest
import tiny_models
import torch
from torch import nn

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.webui.host import Host
from lib_async_lowvram.webui.lowvram import Integration
from lib_async_lowvram.webui.settings import PREVIEWS, SettingsReader

PATIENCE = 60


@pytest.fixture
def previews(webui, monkeypatch):
    """A started integration with a model, and a way to wait for what is shown. Pictures are their pixels."""
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=200e6, latency=1e-5)

    def make_mover(config, device):
        mover = AsyncModelMover(OffloadConfig(budget_bytes=24 << 10, small_leaf_bytes=0, check_placement=True), streams)
        mover.configure = lambda config: None
        return mover

    host = Host("1.10.1", False, torch.device("cpu"), True, "simulated")
    integration = Integration.start(host, settings=SettingsReader(environment={}), make_mover=make_mover)
    integration.model = webui.sd_models.load_model(tiny_models.make)
    integration.state = webui.shared.state
    integration.shown = threading.Semaphore(0)
    show = integration._previews._show

    def shown(picture):
        show(picture)
        integration.shown.release()

    monkeypatch.setattr(integration._previews, "_show", shown)
    monkeypatch.setattr(integration._previews, "_render", lambda pixels: ("worker", tuple(pixels.shape), int(pixels.flatten()[0])))
    yield integration
    integration._in_job = False
    integration.close()
    streams.close()


def latents(value=0.5, count=2):
    return torch.full((count, 4, 2, 2), value)


def wait(integration):
    assert integration.shown.acquire(timeout=PATIENCE)


def test_a_due_frame_is_shown_and_the_whole_batch_in_it(webui, previews):
    previews.state.begin("job")
    webui.sd_samplers_common.store_latent(latents())
    wait(previews)
    assert previews.state.current_image == ("worker", (2, 2, 2, 3), 191)
    assert previews.state.id_live_preview == 1
    assert torch.equal(previews.state.current_latent, latents())
    assert previews.status()["preview"]["decoded"] == 1


def test_without_the_grid_only_the_first_picture(webui, previews):
    webui.data["show_progress_grid"] = False
    previews.state.begin("job")
    webui.sd_samplers_common.store_latent(latents())
    wait(previews)
    assert previews.state.current_image[1] == (1, 2, 2, 3)


@pytest.mark.parametrize(("every", "due"), [(1, [0, 1, 2, 3, 4, 5]), (3, [0, 3]), (0, []), (-1, [])])
def test_the_period(webui, previews, every, due):
    webui.data["show_progress_every_n_steps"] = every
    previews.state.begin("job")
    for step in [0, *range(6)]:  # step 0 twice, as the host does: it sets the step after the model call
        previews.state.sampling_step = step
        before = previews.status()["preview"]["submitted"]
        webui.sd_samplers_common.store_latent(latents())
        if previews.status()["preview"]["submitted"] > before:
            wait(previews)
            assert due.pop(0) == step
    assert due == []
    previews.state.nextjob()
    if every == -1:
        wait(previews)
    assert previews.state.id_live_preview == previews.status()["preview"]["decoded"]


def test_switched_off_in_the_live_preview_settings(webui, previews):
    webui.data["live_previews_enable"] = False
    previews.state.begin("job")
    webui.sd_samplers_common.store_latent(latents())
    assert previews.status()["preview"]["submitted"] == 0
    assert previews.state.current_latent is not None


def test_nothing_of_job_one_in_job_two_nor_after_the_end(webui, previews, monkeypatch):
    held = threading.Semaphore(0)
    begun = threading.Semaphore(0)

    class Held(nn.Module):
        def forward(self, x):
            begun.release()
            assert held.acquire(timeout=PATIENCE)
            return x[:, :3]

    monkeypatch.setattr(webui.sd_vae_approx, "model", Held)
    previews.state.begin("one")
    webui.sd_samplers_common.store_latent(latents(-1.0))
    assert begun.acquire(timeout=PATIENCE)
    previews.state.end()
    previews.state.begin("two")
    held.release()
    webui.sd_samplers_common.store_latent(latents(1.0))
    held.release()
    wait(previews)
    assert previews.state.current_image[2] == 255
    assert previews.state.id_live_preview == 1
    assert previews.status()["preview"]["skipped"] == 1


@pytest.mark.parametrize("off", [True, False])
def test_the_hosts_functions_are_its_own_again(webui, previews, off):
    patched = webui.sd_samplers_common.store_latent
    originals = (patched.__wrapped__, webui.shared_state.State.do_set_current_image.__wrapped__)
    if off:
        webui.data[PREVIEWS] = False
        previews.state.begin("job")
    else:
        previews.close()
    assert (webui.sd_samplers_common.store_latent, webui.shared_state.State.do_set_current_image) == originals
    webui.sd_samplers_common.store_latent(latents())
    assert previews.state.current_image == ("inline", 0.5)
    if off:
        webui.data[PREVIEWS] = True
        previews.state.begin("job")
        webui.sd_samplers_common.store_latent(latents())
        wait(previews)
        assert previews.state.current_image[0] == "worker"


def test_inline_while_classes_are_patched_for_all_threads(webui, previews, monkeypatch):
    monkeypatch.setattr(nn.Linear, "org_forward", nn.Linear.forward, raising=False)
    previews.state.begin("job")
    webui.sd_samplers_common.store_latent(latents())
    assert previews.state.current_image == ("inline", 0.5)
    assert previews.status()["preview"]["submitted"] == 0


def test_a_method_that_cannot_be_had_costs_frames_and_no_job(webui, previews):
    webui.data["show_progress_type"] = "TAESD"
    previews.state.begin("job")
    for step in range(5):
        previews.state.sampling_step = step
        webui.sd_samplers_common.store_latent(latents())
    assert previews.status()["preview"]["errors"] >= 3
    assert previews.state.current_image is None


def test_the_cheap_method_is_the_hosts_linear_map(webui, previews):
    webui.data["show_progress_type"] = "Approx cheap"
    previews.state.begin("job")
    webui.sd_samplers_common.store_latent(latents())
    wait(previews)
    assert previews.state.current_image == ("worker", (2, 2, 2, 3), 191)


def test_close_stops_the_thread(webui, previews):
    previews.state.begin("job")
    webui.sd_samplers_common.store_latent(latents())
    wait(previews)
    assert any(thread.name == "async-lowvram-preview" for thread in threading.enumerate())
    previews.state.end()
    previews.close()
    assert not any(thread.name == "async-lowvram-preview" for thread in threading.enumerate())
    assert previews.status()["preview"]["decoded"] == 1  # what was counted stays
