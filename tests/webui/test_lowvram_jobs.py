"""Jobs, settings and reloads: when the integration switches, closes and lets go."""

from __future__ import annotations

import threading

import tiny_models
import torch

from lib_async_lowvram.webui import patching
from lib_async_lowvram.webui.settings import ENABLED, PREFIX


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
