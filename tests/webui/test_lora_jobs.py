"""Whole jobs under the built-in LoRA's behaviour, on the host double: pictures as without the extension, weights as without it.

With LoRA's backups as they are, and with the extension's way of taking them from masters.
"""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import tiny_models
import torch
from moving_rig import Interrupt, job, worked

from lib_async_lowvram.webui.lora import LoraBackups
from tests import lora_double
from tests.lora_double import LoraDouble, Network

ONE, STRONGER, OTHER = Network("one"), Network("one", 2.0), Network("other", biased=lambda name: True)


class Jobs:
    """A managed model, and a plain twin that does the same."""

    def __init__(self, webui, integration, lora, kind):
        self.webui, self.integration, self.lora = webui, integration, lora
        self.model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
        self.twin = tiny_models.make(kind)
        lora.name_layers(self.model, self.twin)

    def run(self, *networks, **kwargs):
        self.lora.want(*networks)
        wanted = tiny_models.picture(self.twin, **kwargs)
        self.lora.want(*networks)
        assert torch.equal(job(self.webui, self.model, **kwargs), wanted)

    def same_weights(self):
        theirs = self.twin.state_dict()
        for name, value in self.model.state_dict().items():
            assert torch.equal(value, theirs[name]), name

    def write_backs(self):
        return {name.split("#")[0]: network["write_backs"] for name, network in self.integration.status()["networks"].items()}


@pytest.fixture(params=[False, True], ids=["as it is", "from masters"])
def lora(request, webui):
    with LoraDouble() as double:
        if request.param:
            integration = request.getfixturevalue("moving")
            backups = LoraBackups(lambda: integration.movers[-1].backups if integration.movers else None)
            double.store = lambda weight: backups._on_store(lora_double.store, weight)
            double.restore = lambda owner, field, kept: backups._on_restore(lora_double.restore, owner, field, kept)
        double.from_masters = request.param
        yield double


@pytest.fixture
def jobs(request, webui, lora):
    integration = request.getfixturevalue("moving")
    return lambda kind="sd1": Jobs(webui, integration, lora, kind)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_applied_to_both_changed_and_removed(jobs, kind):
    at = jobs(kind)
    at.run()
    for networks in ([ONE], [ONE], [STRONGER], [STRONGER, OTHER], [OTHER], [], []):
        before = at.write_backs()
        at.run(*networks)
        at.same_weights()
        after = at.write_backs()
        at.run(*networks)
        assert at.write_backs() == after  # nothing is written back while nothing changes
        if not at.lora.from_masters and networks and networks != [ONE]:
            assert after["unet"] - before["unet"] == 2 + 7 * 3  # every leaf of its blocks; `out` is stock's
    for name, parameter in tiny_models.make(kind).named_parameters():
        assert torch.equal(at.model.get_parameter(name), parameter), name
    worked(at.integration, undisturbed=False)


def test_another_network_for_the_second_half_of_a_picture(jobs):
    at = jobs()
    for _ in range(3):
        at.run(ONE, before_step=lambda step: at.lora.want(*([ONE] if step < 2 else [OTHER])))
    at.run()
    worked(at.integration, undisturbed=False)


@pytest.mark.parametrize("error", [Interrupt, RuntimeError])
@pytest.mark.parametrize("where", ["input_blocks.0.norm", "output_blocks.1.shrink", "out"])
def test_removed_after_an_interrupted_job(webui, jobs, error, where):
    at = jobs()
    at.run()
    at.lora.want(ONE)

    def stop(*_):
        raise error("stop")

    for model, run in ((at.twin, tiny_models.picture), (at.model, lambda model: job(webui, model))):
        handle = model.model.diffusion_model.get_submodule(where).register_forward_hook(stop)
        with contextlib.closing(contextlib.ExitStack()) as stack, pytest.raises(error):
            stack.callback(handle.remove)
            run(model)
        handle.remove()
    at.run()
    at.same_weights()
    at.run(ONE)
    at.run()
    worked(at.integration, undisturbed=False)


def test_another_checkpoint_under_an_applied_network(webui, jobs):
    at = jobs()
    at.run(ONE)
    for seed in (7, 8):
        state = copy.deepcopy(tiny_models.make(seed=seed).state_dict())
        webui.sd_models.load_weights_in_place(at.model, state)
        at.twin.load_state_dict(state)
        at.run(ONE)
        at.run()
    at.same_weights()


def test_a_refiner_in_the_middle_of_a_job(webui, jobs):
    at = jobs()
    base, refiner = copy.deepcopy(at.twin.state_dict()), tiny_models.make(seed=7).state_dict()

    def switching(load):
        return lambda step: load(base if step == 0 else refiner) if step in (0, 2) else None

    for networks in ([], [ONE], [OTHER], []):
        at.lora.want(*networks)
        wanted = tiny_models.picture(at.twin, before_step=switching(lambda state: at.twin.load_state_dict(state)))
        load = switching(lambda state: webui.sd_models.load_weights_in_place(at.model, state))
        assert torch.equal(job(webui, at.model, before_step=load), wanted)
    at.same_weights()


def test_models_kept_in_memory_each_with_its_own(webui, jobs):
    at = jobs()
    at.run(ONE)
    second, twin = webui.sd_models.load_beside(lambda: tiny_models.make("sdxl", seed=2)), tiny_models.make("sdxl", seed=2)
    at.lora.name_layers(second, twin)
    for networks in ([ONE], [OTHER], []):
        at.lora.want(*networks)
        assert torch.equal(job(webui, second), tiny_models.picture(twin))
        webui.sd_models.use_loaded(at.model)
        at.run(*networks)
        webui.sd_models.use_loaded(second)
    at.same_weights()
    worked(at.integration, undisturbed=False)


def test_unloaded_by_another_thread_in_the_middle(webui, jobs):
    at = jobs()
    at.run()

    def unload(step):
        caller = threading.Thread(target=webui.sd_models.unload_model_weights)
        caller.start()
        caller.join()

    at.lora.want(ONE)
    wanted = tiny_models.picture(at.twin)
    assert torch.equal(job(webui, at.model, before_step=unload), wanted)
    at.run(STRONGER)
    at.run()
    at.same_weights()


def test_given_back_with_the_network_applied(webui, jobs):
    # Switched off under an applied network: stock goes on with the weights as they are, and LoRA with its backups.
    at = jobs()
    at.run(ONE)
    at.integration.close()
    at.run(ONE)
    at.run()
    at.same_weights()


def test_functional(jobs):
    at = jobs()
    at.run()
    at.lora.functional = True
    before = at.write_backs()
    at.run(ONE)
    assert at.write_backs() == before
    at.lora.functional = False
    at.run(ONE)
    at.lora.functional = True
    at.run(ONE)
    at.run()
    at.same_weights()
    worked(at.integration, undisturbed=False)
