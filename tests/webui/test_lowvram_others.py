"""Others that patch the same places, wrapped parts, and what fails: stock is there, object for object."""

from __future__ import annotations

import gc

import pytest
import tiny_models
import torch

from lib_async_lowvram.webui.settings import ENABLED
from tests.webui.lowvram_rig import stock_setup


def test_every_patch_is_undone(webui, recording):
    assert len(webui.patches.originals["async_lowvram"]) == 10
    patched = {key: getattr(*key) for key in webui.patches.originals["async_lowvram"]}
    originals = dict(webui.patches.originals["async_lowvram"])
    recording.integration.close()
    assert webui.patches.originals["async_lowvram"] == {}
    for (owner, field), original in originals.items():
        assert getattr(owner, field) is original is not patched[owner, field]


def test_patched_over_ours_passes_through_and_wakes_up(webui, recording):
    ours = webui.lowvram.send_everything_to_cpu
    calls = []

    def theirs():
        calls.append("theirs")
        ours()

    webui.lowvram.send_everything_to_cpu = theirs
    webui.sd_models.load_model(tiny_models.make)
    first_mover = recording.mover
    recording.integration.close()
    assert webui.lowvram.send_everything_to_cpu is theirs
    first_mover.calls.clear()
    webui.lowvram.send_everything_to_cpu()
    assert first_mover.calls == []
    recording.integration = recording.start()
    recording.mover.calls.clear()
    webui.lowvram.send_everything_to_cpu()
    assert recording.mover.calls == [("drain",)]
    assert calls.count("theirs") == len(calls)


def test_patched_over_and_taken_away_while_we_were_closed(webui, recording):
    stock = webui.patches.originals["async_lowvram"][webui.lowvram, "send_everything_to_cpu"]
    webui.lowvram.send_everything_to_cpu = lambda: None
    recording.integration.close()
    webui.lowvram.send_everything_to_cpu = stock
    gc.collect()
    recording.integration = recording.start()
    webui.sd_models.load_model(tiny_models.make)
    recording.mover.calls.clear()
    webui.lowvram.send_everything_to_cpu()
    assert recording.mover.calls == [("drain",)]


def test_a_vae_somebody_wrapped_before_us_is_left_to_stock(webui, request):
    model = tiny_models.make()
    stock_setup(webui, model)
    stock_decode = model.first_stage_model.decode
    theirs = model.first_stage_model.decode = lambda z: stock_decode(z)
    recording = request.getfixturevalue("recording")
    assert recording.mover.networks.keys() == {"unet", "text"}
    assert model.first_stage_model.decode is theirs
    model.condition(torch.tensor([[1]]))
    drains = len(recording.mover.named("drain"))
    model.first_stage_model.decode(torch.zeros(1, tiny_models.WIDTH))
    assert webui.lowvram.module_in_gpu is model.first_stage_model
    assert len(recording.mover.named("drain")) == drains + 1  # stock took the device over: the mover left it


def test_a_vae_somebody_wrapped_after_us_passes_through_once_we_are_gone(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)
    ours = model.first_stage_model.decode
    theirs = model.first_stage_model.decode = lambda z: ours(z)
    latent = torch.ones(1, tiny_models.WIDTH)
    expected = model.first_stage_model.decode(latent)
    recording.integration.close()
    assert model.first_stage_model.decode is theirs
    assert torch.equal(model.first_stage_model.decode(latent), expected)
    assert webui.lowvram.module_in_gpu is model.first_stage_model


def test_a_vae_with_weights_of_its_own_is_left_to_stock(webui, recording):
    model = tiny_models.make()
    model.first_stage_model.codebook = torch.nn.Embedding(4, 4)
    webui.sd_models.load_model(lambda: model)
    assert recording.mover.networks.keys() == {"unet", "text"}
    model.first_stage_model.decode(torch.zeros(1, tiny_models.WIDTH))
    assert webui.lowvram.module_in_gpu is model.first_stage_model


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_medvram_hooks_are_replaced_and_come_back_object_for_object(webui, recording, kind):
    """One hook on the whole UNet, whose every weight is then the network's."""
    model = tiny_models.make(kind)
    webui.lowvram.setup_for_low_vram(model, True)
    spec = recording.mover.networks["unet"]
    unet = model.model.diffusion_model
    assert spec.span is unet and list(spec.roots) == [unet]
    assert [region.module for region in spec.regions] == [
        unet.time_embed, *unet.input_blocks, unet.middle_block, *unet.output_blocks
    ]  # fmt: skip
    [(key, stand_in)] = model.model._forward_pre_hooks.items()
    recording.integration.close()
    assert dict(model.model._forward_pre_hooks) == {key: stand_in.stock}
    assert stand_in.stock.__name__ == "send_me_to_gpu"
    assert torch.equal(tiny_models.picture(model), tiny_models.picture(tiny_models.make(kind)))


def test_a_unet_that_is_hooked_as_a_whole_and_has_weights_around_it_is_left_to_stock(webui, recording):
    model = tiny_models.make()
    model.model.scale = torch.nn.Parameter(torch.ones(1))
    webui.lowvram.setup_for_low_vram(model, True)
    assert recording.mover is None and model.model._forward_pre_hooks
    assert recording.integration.status()["reason"] == "no model is loaded yet"  # nobody loaded it, as far as the host knows


def test_a_failing_attach_leaves_stock(webui, recording, said):
    webui.sd_models.load_model(tiny_models.make)
    recording.mover.fail_on = "attach"
    model = webui.sd_models.load_model(lambda: tiny_models.make("sd2"))
    assert torch.equal(tiny_models.picture(model), tiny_models.picture(tiny_models.make("sd2")))
    status = recording.integration.status()
    assert status["state"] == "demoted"
    assert status["last_error"] == status["reason"] == "failed while taking over a model (RuntimeError)"  # the log has its text
    assert webui.errors.reports
    assert said().count("stock --lowvram moves the weights from here on") == 1
    assert not any(hasattr(fn, "stock") for module in model.modules() for fn in module._forward_pre_hooks.values())


def test_setup_that_fails_in_stock_fails_as_in_stock(webui, recording):
    model = tiny_models.make()
    del model.model.diffusion_model.input_blocks
    with pytest.raises(AttributeError):
        webui.sd_models.load_model(lambda: model)
    assert recording.mover is None


def test_demotion_gives_stock_back_and_says_why(webui, recording, said):
    model = webui.sd_models.load_model(tiny_models.make)
    recording.mover.on_demote("slower than stock")
    assert "slower than stock" in said()
    assert recording.mover.networks == {}
    assert recording.integration.status()["reason"] == "slower than stock"
    assert torch.equal(tiny_models.picture(model), tiny_models.picture(tiny_models.make()))
    webui.shared.state.begin("job")
    assert recording.mover.networks == {}  # not by itself ...
    webui.shared.state.end()
    demoted = recording.mover
    for wanted in (False, True):
        webui.data[ENABLED] = wanted
        webui.shared.state.begin("job")
        webui.shared.state.end()
    assert recording.mover.networks  # ... but when the user asks for it
    assert demoted.named("close") and recording.mover is not demoted
    assert recording.integration.status()["state"] == "active"
