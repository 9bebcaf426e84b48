"""An upscaler in the middle of a job finds the device empty; the pictures around it are the same."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from moving_rig import KINDS

from lib_async_lowvram.webui.settings import ENABLED


def upscaler_that(webui, looks):
    class Looking(webui.upscaler.Upscaler):
        def do_upscale(self, img, selected_model):
            looks()
            return img * 2

    return Looking()


def test_ours_leaves_before_an_upscaler_runs(webui, recording):
    webui.sd_models.load_model(lambda: tiny_models.make("sd1"))
    webui.shared.state.begin("job")
    before, seen = len(recording.mover.named("drain")), []
    upscaler = upscaler_that(webui, lambda: seen.append(len(recording.mover.named("drain"))))
    assert upscaler.upscale(3, 2.0, "path") == 6
    assert seen == [before + 1]


def test_a_mover_that_fails_to_leave_does_not_stop_the_upscaler(webui, recording):
    webui.sd_models.load_model(lambda: tiny_models.make("sd1"))
    recording.mover.fail_on = "drain"
    assert upscaler_that(webui, lambda: None).upscale(3, scale=2.0) == 6
    assert recording.integration.status()["state"] == "demoted"


def test_the_method_is_given_back(webui, request):
    stock = webui.upscaler.Upscaler.upscale
    recording = request.getfixturevalue("recording")
    assert webui.upscaler.Upscaler.upscale is not stock
    recording.integration.close()
    assert webui.upscaler.Upscaler.upscale is stock


@pytest.mark.parametrize("enabled", [True, False])
def test_without_a_model_and_switched_off_it_passes_through(webui, recording, enabled):
    webui.data[ENABLED] = enabled
    webui.shared.state.begin("job")
    assert upscaler_that(webui, lambda: None).upscale(3, 2.0) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_same_pictures_with_an_empty_device_in_between(webui, moving, kind):
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    twin = tiny_models.make(kind)
    resident, seen = [], []
    upscaler = upscaler_that(webui, lambda: seen.append(moving.status()["allocated_bytes"]))
    for _ in range(4):
        webui.shared.state.begin("job")
        first = tiny_models.picture(model)
        resident.append(moving.status()["allocated_bytes"])
        image = upscaler.upscale(torch.ones(2, tiny_models.WIDTH), 2.0)
        second = tiny_models.picture(model, image=image)
        webui.lowvram.send_everything_to_cpu()
        webui.shared.state.end()
        assert torch.equal(first, tiny_models.picture(twin))
        assert torch.equal(second, tiny_models.picture(twin, image=torch.ones(2, tiny_models.WIDTH) * 2))
    assert min(resident[1:]) > 0, "nothing would have been in the upscaler's way"
    assert seen == [0] * 4
    status = moving.status()
    assert status["state"] == "active" and status["streamed_bytes"] > 0
    assert status["placement_faults"] == 0, status["last_error"]
