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

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.log import Remembered
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.webui.host import Host
from lib_async_lowvram.webui.lowvram import Integration
from lib_async_lowvram.webui.panel import Panel
from lib_async_lowvram.webui.settings import ENABLED, PREFIX, SettingsReader
from lib_async_lowvram.webui.status import complete as status_of
from tests.webui.test_panel import validated as schema_of

KINDS = ["sd1", "sd2", "sdxl"]
BUDGET = 24 << 10


@pytest.fixture
def moving(webui):
    """A started integration whose mover works with a budget of a few blocks."""
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=200e6, latency=1e-5, jitter_seconds=2e-4, seed=3, poison=True)
    movers = []

    def make_mover(config, device):
        # A budget under one megabyte is below what the slider can say, and these models are that small.
        small = OffloadConfig(budget_bytes=BUDGET, small_leaf_bytes=0, check_placement=True)
        movers.append(AsyncModelMover(small, streams))
        movers[-1].configure = lambda config: None
        return movers[-1]

    host = Host("1.10.1", False, torch.device("cpu"), True, "simulated")
    integration = Integration.start(host, settings=SettingsReader(environment={}), make_mover=make_mover)
    integration.movers = movers
    yield integration
    integration._in_job = False
    integration.close()
    streams.close()


def job(webui, model, **kwargs):
    """One picture as a job of the host, with the moments the extension relies on."""
    state = webui.shared.state
    state.begin("job")
    try:
        return tiny_models.picture(model, **kwargs)
    finally:
        webui.lowvram.send_everything_to_cpu()
        webui.devices.torch_gc()
        state.end()


def worked(integration, *, undisturbed=True):
    """The mover did its work, kept its promises, and nothing is left on the device. `undisturbed`: nobody made it leave the
    device in the middle of sampling, which it may have to wait for."""
    status = integration.status()
    assert status["state"] == "active", status
    assert status["streamed_bytes"] > 0 and status["hits"] > 0
    assert status["placement_faults"] == 0, status["last_error"]
    assert status["host_waits"] == 0 or not undisturbed
    assert 0 < status["peak_weight_bytes"] <= BUDGET
    assert status["allocated_bytes"] == 0
    return status


def validated(integration):
    """What a page is told about this integration, as the published schemas say."""
    panel = Panel(integration, "", Remembered())
    return schema_of(status_of(panel.status()), "status"), schema_of(panel.timeline(), "timeline")


def expected(kind, **kwargs):
    return tiny_models.picture(tiny_models.make(kind), **kwargs)


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


class Interrupt(BaseException):
    """As the host's own: not an Exception."""


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
