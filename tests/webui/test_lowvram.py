"""The integration's own decisions, over a mover that only writes down what it is asked."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import tiny_models
import torch

from lib_async_lowvram.webui import patching
from lib_async_lowvram.webui.settings import ENABLED, PREFIX


def hooks_of(model):
    """Every forward pre-hook of a model and the VAE's instance attributes: what `--lowvram` leaves behind, as objects."""
    vae = model.first_stage_model
    found = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules() if module._forward_pre_hooks}
    return found | {"encode": vars(vae).get("encode"), "decode": vars(vae).get("decode")}


def same_objects(one, other):
    def ids(found):
        hooks = {name: [(key, id(fn)) for key, fn in value.items()] for name, value in found.items() if isinstance(value, dict)}
        return hooks | {name: id(value) for name, value in found.items() if not isinstance(value, dict)}

    return ids(one) == ids(other)


def stock_setup(webui, model):
    """What stock alone puts on a model."""
    patching_is_on = patching.handler_of(webui.lowvram, "setup_for_low_vram")
    assert patching_is_on is None
    webui.sd_models.send_model_to_device(model)
    webui.sd_models.model_data.set_sd_model(model)
    return hooks_of(model)


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


def test_switched_off_for_the_next_job_only(webui, recording):
    model = tiny_models.make()
    webui.sd_models.load_model(lambda: model)
    state = webui.shared.state
    state.begin("one")
    webui.data[ENABLED] = False
    assert recording.mover.networks  # the running job keeps what it began with
    state.end()
    assert recording.mover.networks
    state.begin("two")
    assert recording.mover.networks == {}
    assert all(fn.__module__ == "modules.lowvram" for fn in model.first_stage_model._forward_pre_hooks.values())
    assert recording.integration.status()["state"] == "standing_down"
    expected = tiny_models.picture(tiny_models.make())
    assert torch.equal(tiny_models.picture(model), expected)
    state.end()
    webui.data[ENABLED] = True
    state.begin("three")
    assert recording.mover.networks.keys() == {"unet", "text", "vae_encode", "vae_decode"}
    assert torch.equal(tiny_models.picture(model), expected)
    state.end()


def test_loaded_while_switched_off_and_switched_on_later(webui, request):
    webui.data[ENABLED] = False
    recording = request.getfixturevalue("recording")
    webui.sd_models.load_model(tiny_models.make)
    assert recording.mover is None
    webui.data[ENABLED] = True
    webui.shared.state.begin("job")
    assert recording.mover.networks.keys() == {"unet", "text", "vae_encode", "vae_decode"}
    webui.shared.state.end()


def test_settings_are_read_at_each_pass(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)

    def slide(step):
        webui.data[PREFIX + "lookahead_mb"] = 100 * (step // 2)

    tiny_models.picture(model, steps=4, before_step=slide)
    assert [config.lookahead_bytes >> 20 for _, config in recording.mover.named("configure")] == [100]
    webui.data[PREFIX + "lookahead_mb"] = "abc"
    tiny_models.picture(model, steps=1)
    assert recording.mover.config.lookahead_bytes == 0


def test_the_config_comes_before_the_pass_it_is_for(webui, recording):
    """Our hook on the span precedes the one the mover put there when it was attached."""
    order = []

    def attach_with_hook(specs):
        recording_attach(specs)
        specs["unet"].span.register_forward_pre_hook(lambda module, args: order.append("mover"), prepend=True)

    model = tiny_models.make()
    webui.sd_models.load_model(tiny_models.make)
    recording_attach = recording.mover.attach
    recording.mover.attach = attach_with_hook
    webui.sd_models.load_model(lambda: model)
    recording.mover.configure = lambda config: order.append("configure")
    webui.data[PREFIX + "budget_mb"] = 5
    model.model(*(torch.zeros(1, tiny_models.WIDTH) for _ in range(3)))
    assert order == ["configure", "mover"]


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


def test_reload_ui_adopts_what_is_loaded(webui, recording):
    model = webui.sd_models.load_model(tiny_models.make)
    first_mover = recording.mover
    recording.integration.close()
    again = recording.start()
    assert again is not recording.integration
    assert recording.mover is not first_mover
    assert recording.mover.networks.keys() == {"unet", "text", "vae_encode", "vae_decode"}
    recording.integration = again
    assert torch.equal(tiny_models.picture(model), tiny_models.picture(tiny_models.make()))


def test_a_script_run_again_without_unloading_finds_the_integration(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    assert recording.start() is recording.integration
    assert len(recording.mover.named("attach")) == 1


def test_unloading_during_a_job_waits_for_its_end(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    webui.shared.state.begin("job")
    closer = threading.Thread(target=recording.integration.close)
    closer.start()
    closer.join()
    assert recording.mover.networks
    webui.shared.state.end()
    assert recording.mover.networks == {}
    assert patching.handler_of(webui.lowvram, "setup_for_low_vram") is None


def test_loaded_again_before_the_job_ended(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    webui.shared.state.begin("job")
    recording.integration.close()
    assert recording.start() is recording.integration
    webui.shared.state.end()
    assert recording.mover.networks


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


def test_a_jobs_end_closes_everything_in_flight(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    webui.shared.state.begin("job")
    recording.mover.calls.clear()
    webui.shared.state.end()
    assert recording.mover.calls[0] == ("drain",)


def test_a_job_that_raised_is_closed_when_the_host_collects(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    state = webui.shared.state
    state.begin("job")
    recording.mover.calls.clear()
    state.job, state.job_count = "", 0  # what the host does in place of State.end
    webui.devices.torch_gc()
    assert recording.mover.calls[0] == ("drain",)
    recording.mover.calls.clear()
    webui.devices.torch_gc()
    assert ("drain",) not in recording.mover.calls


def test_torch_gc_waits_for_copies_then_collects(webui, recording):
    webui.sd_models.load_model(tiny_models.make)
    recording.mover.calls.clear()
    before = webui.devices.collections
    webui.devices.torch_gc()
    assert recording.mover.calls == [("synchronize", "onload"), ("synchronize", "offload")]
    assert webui.devices.collections == before + 1
    recording.mover.streams.done = lambda event: True
    webui.devices.torch_gc()
    assert len(recording.mover.calls) == 2


def test_status_before_any_model(webui, recording):
    assert recording.integration.status()["state"] == "standing_down"
    assert recording.integration.status()["reason"] == "no model is loaded yet"


def test_no_mover_before_the_first_model(webui, recording):
    webui.devices.torch_gc()
    webui.lowvram.send_everything_to_cpu()
    webui.shared.state.begin("job")
    webui.shared.state.end()
    assert recording.mover is None
