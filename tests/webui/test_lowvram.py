"""The integration's own decisions, over a mover that only writes down what it is asked."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import tiny_models
import torch

from tests.webui.lowvram_rig import hooks_of, same_objects, stock_setup


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_stock_is_replaced_and_comes_back_object_for_object(webui, kind, request):
    model = tiny_models.make(kind)
    before = stock_setup(webui, model)
    recording = request.getfixturevalue("recording")
    assert not same_objects(hooks_of(model), before)
    assert recording.mover.networks.keys() == {"unet", "text", "vae_encode", "vae_decode"}
    recording.integration.close()
    assert same_objects(hooks_of(model), before)
    assert webui.lowvram.module_in_gpu is None
    assert recording.mover.networks == {}
    assert recording.mover.named("close")


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_model_is_taken_over_as_it_is_set_up(webui, recording, kind):
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    specs = recording.mover.networks
    unet = model.model.diffusion_model
    assert [region.module for region in specs["unet"].regions] == [
        unet.time_embed, *unet.input_blocks, unet.middle_block, *unet.output_blocks
    ]
    assert specs["unet"].span is unet
    vae = model.first_stage_model
    assert [region.module for region in specs["vae_encode"].regions] == [vae.encoder, vae.quant_conv]
    assert [region.module for region in specs["vae_decode"].regions] == [vae.decoder, vae.post_quant_conv]
    assert specs["vae_decode"].span is None
    (region,) = specs["text"].regions
    if kind == "sdxl":
        assert (region.module, region.trigger, specs["text"].span) == (model.conditioner,) * 3
    elif kind == "sd2":
        assert region.module is model.cond_stage_model
        assert region.trigger is specs["text"].span is model.cond_stage_model.model.token_embedding
    else:
        assert region.module is model.cond_stage_model
        assert region.trigger is specs["text"].span is model.cond_stage_model.transformer
    assert specs["text"].open_ended is (kind == "sd2")
    assert webui.lowvram.is_enabled(model) is True


def test_depth_model_and_embedder_are_networks(webui, recording):
    model = tiny_models.make()
    model.depth_model, model.embedder = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    webui.sd_models.load_model(lambda: model)
    assert recording.mover.networks["depth_model"].span is model.depth_model
    assert recording.mover.networks["embedder"].span is model.embedder


def test_hook_order_and_ids_are_kept(webui, recording):
    model = tiny_models.make()
    block = model.model.diffusion_model.middle_block
    seen = []
    block.register_forward_pre_hook(lambda module, args: seen.append("first"))
    webui.sd_models.load_model(lambda: model)
    block.register_forward_pre_hook(lambda module, args: seen.append(webui.lowvram.module_in_gpu is not None))
    webui.lowvram.module_in_gpu = None
    block(torch.zeros(1, tiny_models.WIDTH))
    assert seen == ["first", True]
    ids = list(block._forward_pre_hooks)
    recording.integration.close()
    assert list(block._forward_pre_hooks) == ids


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_same_picture_through_the_stand_ins(webui, recording, kind):
    expected = tiny_models.picture(tiny_models.make(kind))
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    assert torch.equal(tiny_models.picture(model), expected)
    assert recording.mover.named("running") == [("running", "vae_decode")]


def test_encode_runs_inside_its_pass(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)
    model.first_stage_model.encode(torch.zeros(1, tiny_models.WIDTH))
    model.first_stage_model(torch.zeros(1, tiny_models.WIDTH))
    assert [name for _, name in recording.mover.named("running")] == ["vae_encode", "vae_encode", "vae_decode"]


def test_module_in_gpu_tells_that_something_of_ours_is_there(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)
    model.condition(torch.tensor([[1]]))
    ours = webui.lowvram.module_in_gpu
    assert isinstance(ours, torch.nn.Module)
    assert list(ours.parameters()) == []
    drains = len(recording.mover.named("drain"))
    assert ours.to("cpu") is ours
    assert len(recording.mover.named("drain")) == drains + 1


def test_what_stock_has_on_the_device_leaves_it_first(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)
    moved = []
    other = torch.nn.Linear(1, 1)
    other.to = lambda device: moved.append(device)
    webui.lowvram.module_in_gpu = other
    model.first_stage_model.decode(torch.zeros(1, tiny_models.WIDTH))
    assert moved == [torch.device("cpu")]
    assert webui.lowvram.module_in_gpu is not other


def test_send_everything_to_cpu_drains_even_after_somebody_wrote_none(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    webui.lowvram.module_in_gpu = None
    recording.mover.calls.clear()
    webui.lowvram.send_everything_to_cpu()
    assert recording.mover.calls == [("drain",)]
    assert webui.lowvram.module_in_gpu is None


def test_controlnet_asks_at_the_start_of_every_pass(webui, recording):
    """It replaces `forward` of the UNet by one that first calls `send_everything_to_cpu`: that must not empty the device."""
    model = webui.sd_models.load_model(tiny_models.make)
    unet = model.model.diffusion_model
    plain = unet.forward

    def forward(*args):
        webui.lowvram.send_everything_to_cpu()
        elsewhere = threading.Thread(target=webui.lowvram.send_everything_to_cpu)
        elsewhere.start()
        elsewhere.join()
        return plain(*args)

    unet.forward = forward
    recording.mover.calls.clear()
    tiny_models.picture(model, steps=3)
    assert len(recording.mover.named("drain")) == 3  # from the other threads only
    recording.mover.calls.clear()
    webui.lowvram.send_everything_to_cpu()  # and after the pass it means what it says
    assert recording.mover.named("drain")


@pytest.mark.parametrize("still_open", [True, False])
def test_a_pass_that_loading_left_open_is_ended(webui, recording, still_open):
    webui.sd_models.load_model(tiny_models.make)
    recording.mover.in_pass = still_open
    webui.sd_models.load_beside(tiny_models.make)
    assert (recording.mover.calls[-1] == ("drain",)) == still_open


def test_a_deepcopied_block_behaves_as_stock(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)
    block = copy.deepcopy(model.model.diffusion_model.middle_block)
    webui.lowvram.module_in_gpu = None
    block(torch.zeros(1, tiny_models.WIDTH))
    assert webui.lowvram.module_in_gpu is block
    copy.deepcopy(model)  # the whole model, hooks and stand-ins included


def test_prepare_goes_to_the_unet_of_the_model_in_use(webui, recording):
    recording.integration.prepare()  # nothing loaded yet
    first = webui.sd_models.load_model(tiny_models.make)
    second = webui.sd_models.load_beside(lambda: tiny_models.make(seed=1))
    recording.integration.prepare()
    webui.sd_models.use_loaded(first)
    recording.integration.prepare()
    assert recording.mover.named("prepare") == [("prepare", "unet#2"), ("prepare", "unet")]
    assert second is not first


def test_models_kept_in_memory_share_one_mover(webui, recording):
    recording_start = recording.mover
    first = webui.sd_models.load_model(tiny_models.make)
    webui.sd_models.load_beside(lambda: tiny_models.make("sdxl"))
    assert recording_start is None
    assert {"unet", "unet#2", "text", "text#2"} <= recording.mover.networks.keys()
    webui.sd_models.use_loaded(first)
    assert len(recording.mover.named("attach")) == 2


def test_the_inactive_model_goes_back_to_stock_when_pinned_memory_is_short(webui, recording):
    first = webui.sd_models.load_model(tiny_models.make)
    recording.mover.pinned_bytes = 1 << 30
    webui.sd_models.load_beside(lambda: tiny_models.make(seed=1))
    assert recording.mover.networks.keys() == {"unet", "text", "vae_encode", "vae_decode"}
    webui.sd_models.use_loaded(first)
    assert len(recording.mover.named("attach")) == 3
    assert recording.mover.networks["unet"].span is first.model.diffusion_model


def test_a_thrown_away_model_is_forgotten_before_it_turns_meta(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)
    seen = []
    detach = recording.mover.detach
    recording.mover.detach = lambda names: (seen.append(next(model.parameters()).is_meta), detach(names))
    webui.sd_models.load_model(lambda: tiny_models.make("sdxl"))
    assert seen == [False]
    assert next(model.parameters()).is_meta
    assert recording.mover.networks.keys() == {"unet", "text", "vae_encode", "vae_decode"}


def test_a_meta_model_is_never_taken_over(webui, recording):
    model = tiny_models.make()
    webui.sd_models.send_model_to_device(model)
    webui.sd_models.send_model_to_trash(model)
    recording.integration.adopt(model)
    assert recording.mover.networks == {}


def test_models_are_not_held_alive(webui, recording):
    gone = weakref.ref(webui.sd_models.load_model(tiny_models.make))
    recording.mover.networks = dict.fromkeys(recording.mover.networks)  # the recorder alone held the specs
    webui.sd_models.model_data.set_sd_model(None)
    webui.sd_models.model_data.loaded_sd_models.clear()
    gc.collect()
    assert gone() is None
    webui.shared.state.begin("job")
    assert recording.mover.networks == {}
    webui.shared.state.end()
