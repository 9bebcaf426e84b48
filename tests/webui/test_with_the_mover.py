"""The integration over the real mover on the simulated device: same pictures as stock, slow jittery link, poison on.

Every equality comes with what makes it mean something: the mover was active, streamed bytes, and hit; and afterwards stock
gets its model back bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import tiny_models
import torch
from moving_rig import BUDGET, KINDS, Interrupt, expected, job, worked

from lib_async_lowvram.log import Remembered
from lib_async_lowvram.webui.panel import Panel
from lib_async_lowvram.webui.settings import ENABLED, PREFIX
from lib_async_lowvram.webui.status import complete as status_of
from tests.webui.test_panel import validated as schema_of


def validated(integration):
    """What a page is told about this integration, as the published schemas say."""
    panel = Panel(integration, "", Remembered())
    return schema_of(status_of(panel.status()), "status"), schema_of(panel.timeline(), "timeline")


def test_what_the_page_is_told(webui, moving):
    model = webui.sd_models.load_model(lambda: tiny_models.make("sd1"))
    job(webui, model)
    validated(moving)  # asks for a timeline
    webui.shared.state.begin("job")
    tiny_models.picture(model)
    status, timeline = validated(moving)
    assert status["generating"] and status["state"] == "active" and status["pass_seconds"] > 0
    vram = status["vram"]
    assert vram["total"] == 64 << 20 == sum(vram[part] or 0 for part in ("resident", "ring", "activations", "others", "free"))
    assert 0 < vram["resident"] + vram["ring"] <= vram["budget"] == BUDGET
    lanes = {span["lane"] for span in timeline["spans"]}
    assert {"compute", "copy"} <= lanes and timeline["seconds"] > 0
    blocks = ("time_embed", "input_blocks.", "middle_block.", "output_blocks.", "out.")
    assert [span["name"] for span in timeline["spans"] if not span["name"].startswith(blocks)] == []
    webui.lowvram.send_everything_to_cpu()
    webui.shared.state.end()


@pytest.mark.parametrize("kind", KINDS)
def test_same_pictures_job_after_job(webui, moving, kind):
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    for _ in range(4):
        assert torch.equal(job(webui, model), expected(kind))
    image = torch.ones(2, tiny_models.WIDTH)
    for _ in range(3):
        assert torch.equal(job(webui, model, image=image), expected(kind, image=image))
    status = worked(moving)
    assert status["networks"].keys() == {"unet", "text", "vae_encode", "vae_decode"}
    assert all(network["learning_passes"] == 1 for network in status["networks"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_medvram(webui, moving, kind):
    """The same pictures, within the same budget."""
    webui.shared.cmd_opts.lowvram, webui.shared.cmd_opts.medvram = False, True
    try:
        model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
        image = torch.ones(2, tiny_models.WIDTH)
        for _ in range(3):
            assert torch.equal(job(webui, model), expected(kind))
            assert torch.equal(job(webui, model, image=image), expected(kind, image=image))
        assert worked(moving)["networks"].keys() == {"unet", "text", "vae_encode", "vae_decode"}
        moving.close()
        assert torch.equal(tiny_models.picture(model), expected(kind))
        webui.lowvram.send_everything_to_cpu()
    finally:
        webui.shared.cmd_opts.lowvram, webui.shared.cmd_opts.medvram = True, False


def test_after_loading_the_text_encoder_stays_for_the_first_prompt(webui, moving):
    webui.sd_models.load_model(lambda: tiny_models.make("sdxl"))
    assert moving.status()["in_use"] == "text"
    assert moving.status()["allocated_bytes"] > 0
    webui.sd_models.send_model_to_cpu(webui.sd_models.model_data.sd_model)
    assert moving.status()["allocated_bytes"] == 0


def test_after_loading_one_that_never_says_it_is_done_is_off_the_device(webui, moving):
    webui.sd_models.load_model(lambda: tiny_models.make("sd2"))
    assert moving.status()["in_use"] is None
    assert moving.status()["allocated_bytes"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_encoder_that_nobody_hijacked(webui, moving, kind):
    """Then the module around the one that opens the pass is called, too."""
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    for _ in range(3):
        assert torch.equal(job(webui, model, hijacked=False), expected(kind))
    worked(moving)


@pytest.mark.parametrize("kind", KINDS)
def test_given_back_bit_for_bit(webui, moving, kind):
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    job(webui, model)
    job(webui, model)
    moving.close()
    assert torch.equal(job(webui, model), expected(kind))
    for name, parameter in tiny_models.make(kind).named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    assert not any(hasattr(fn, "stock") for module in model.modules() for fn in module._forward_pre_hooks.values())
    assert all(fn.__module__ == "modules.lowvram" for module in model.modules() for fn in module._forward_pre_hooks.values())
    assert not any(module._forward_hooks for module in model.modules())


def test_prepare_before_sampling_changes_no_pixel(webui, moving):
    model = webui.sd_models.load_model(lambda: tiny_models.make("sd2"))

    def before_step(step):
        if step == 0:
            moving.prepare()

    for _ in range(3):
        assert torch.equal(job(webui, model, before_step=before_step), expected("sd2"))
    worked(moving)


def test_prepare_gets_copies_under_way(webui, moving):
    model = webui.sd_models.load_model(lambda: tiny_models.make("sd2"))
    job(webui, model)
    seen = []

    def before_step(step):
        if step == 0:
            moving.prepare()
            seen.append((moving.status()["in_use"], moving.status()["allocated_bytes"] > 0))

    job(webui, model, before_step=before_step)
    assert seen == [("unet", True)]


def test_controlnet_style_calls_keep_the_device(webui, moving):
    model = webui.sd_models.load_model(tiny_models.make)
    unet = model.model.diffusion_model
    plain = unet.forward
    held = []

    def forward(*args):
        webui.lowvram.send_everything_to_cpu()
        held.append(moving.status()["in_use"])
        return plain(*args)

    unet.forward = forward
    for _ in range(3):
        assert torch.equal(job(webui, model), expected("sd1"))
    assert held == ["unet"] * len(held)
    worked(moving)


@pytest.mark.parametrize("error", [Interrupt, RuntimeError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("where", ["step", "block"])
def test_interrupted_then_generate(webui, moving, error, where):
    model = webui.sd_models.load_model(tiny_models.make)
    job(webui, model)

    def stop(*_):
        raise error("stop")

    with contextlib.ExitStack() as stack:
        if where == "block":
            handle = model.model.diffusion_model.output_blocks[0].grow.register_forward_hook(stop)
            stack.callback(handle.remove)
        with pytest.raises(error):
            job(webui, model, before_step=lambda step: stop() if where == "step" and step == 2 else None)
    for _ in range(2):
        assert torch.equal(job(webui, model), expected("sd1"))
    worked(moving)


def test_unload_from_another_thread_in_the_middle_of_sampling(webui, moving):
    model = webui.sd_models.load_model(tiny_models.make)
    job(webui, model)

    def unload(step):
        caller = threading.Thread(target=webui.sd_models.unload_model_weights)
        caller.start()
        caller.join()

    assert torch.equal(job(webui, model, before_step=unload), expected("sd1"))

    def inside(module, args):
        unload(0)

    handle = model.model.diffusion_model.middle_block.register_forward_pre_hook(inside)
    assert torch.equal(job(webui, model), expected("sd1"))
    handle.remove()
    assert torch.equal(job(webui, model), expected("sd1"))
    worked(moving, undisturbed=False)


def test_off_and_on_again(webui, moving):
    model = webui.sd_models.load_model(tiny_models.make)
    for wanted in (True, False, True, False, True):
        webui.data[ENABLED] = wanted
        assert torch.equal(job(webui, model), expected("sd1"))
        assert (moving.status()["state"] == "standing_down") is not wanted
    for _ in range(2):
        job(webui, model)
    worked(moving)


def test_hostile_settings_in_the_middle_of_a_picture(webui, moving, said):
    model = webui.sd_models.load_model(tiny_models.make)
    values = ["abc", -5, None, 1e9, float("nan"), []]

    def slide(step):
        webui.data[PREFIX + "lookahead_mb"] = values[step]

    assert torch.equal(job(webui, model, steps=len(values), before_step=slide), expected("sd1", steps=len(values)))
    assert said().count("lookahead_mb") == len(values)


def test_a_lora_written_inside_forward_stays(webui, moving):
    """As LoRA does it: through the Parameter, on the device, inside the leaf's forward, once."""

    def add_lora(model):
        leaf = model.model.diffusion_model.output_blocks[1].shrink
        plain = type(leaf).forward

        def forward(x):
            if not getattr(leaf, "applied", False):
                leaf.applied = True
                with torch.no_grad():
                    leaf.weight += 0.25
            return plain(leaf, x)

        leaf.forward = forward

    model = webui.sd_models.load_model(tiny_models.make)
    job(webui, model)
    job(webui, model)
    add_lora(model)
    reference = tiny_models.make()
    add_lora(reference)
    wanted = tiny_models.picture(reference)
    for _ in range(3):
        assert torch.equal(job(webui, model), wanted)
    status = worked(moving, undisturbed=False)
    assert status["write_backs"] >= 1
    assert status["host_waits"] <= status["write_backs"]  # the pass that changed a weight ends when its master is true
    assert torch.equal(model.model.diffusion_model.output_blocks[1].shrink.weight,
                       reference.model.diffusion_model.output_blocks[1].shrink.weight)


def test_out_of_the_stand_ins_a_copied_model_is_stock(webui, moving):
    model = webui.sd_models.load_model(tiny_models.make)
    job(webui, model)
    job(webui, model)
    clone = copy.deepcopy(model)
    assert torch.equal(tiny_models.picture(clone), expected("sd1"))
    assert torch.equal(job(webui, model), expected("sd1"))
