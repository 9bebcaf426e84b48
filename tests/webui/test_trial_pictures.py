"""A trial's pictures through the host's own processing: what is asked for, timed, and put back - also after an error or an interrupt."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import tiny_models
import torch

from lib_async_lowvram.webui import trial_pictures
from lib_async_lowvram.webui.settings import ENABLED
from lib_async_lowvram.webui.trial import Stopped, Trial
from lib_async_lowvram.webui.trial_pictures import JOB, OPTIONS, TrialPictures


class Image:
    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def tobytes(self) -> bytes:
        return self.values.numpy().tobytes()


@pytest.fixture
def host(webui, monkeypatch):
    """The fake host with what makes pictures, and a model; `asked` collects what it was asked to make."""
    processing, call_queue = ModuleType("modules.processing"), ModuleType("modules.call_queue")
    model = webui.sd_models.load_model(lambda: tiny_models.make())
    found = SimpleNamespace(webui=webui, asked=[], closed=0, during=lambda: None, model=model)

    class Processing:
        def __init__(self, **asked) -> None:
            found.asked.append(asked)

        def close(self) -> None:
            found.closed += 1

    def process_images(p):
        assert webui.shared.state.job == JOB and webui.shared.cmd_opts.no_prompt_history is True
        found.during()
        return SimpleNamespace(images=[Image(tiny_models.picture(found.model, steps=found.asked[-1]["steps"]))])

    processing.StableDiffusionProcessingTxt2Img, processing.process_images = Processing, process_images
    call_queue.queue_lock = threading.Lock()
    monkeypatch.setitem(sys.modules, "modules.processing", processing)
    monkeypatch.setitem(sys.modules, "modules.call_queue", call_queue)
    webui.shared.cmd_opts.no_prompt_history = False
    webui.shared.state.stopping_generation = False
    return found


@pytest.fixture
def pictures(host, recording) -> TrialPictures:
    integration = recording.integration
    integration.adopt_loaded()
    return TrialPictures(integration.force, integration.why_not, lambda: 0.5, torch.device("cpu"), False)


def hooks(host) -> list[str]:
    """A trial's own on the UNet."""
    names = [hook.__qualname__ for hook in host.model.model.diffusion_model._forward_pre_hooks.values()]
    return [name for name in names if "TrialPictures" in name]


def test_what_is_asked_for(host, pictures) -> None:
    pictures.note(SimpleNamespace(width=640, height=448, batch_size=2))
    made = pictures.make(True, 5)
    (asked,) = host.asked
    assert {key: asked[key] for key in ("steps", "width", "height", "batch_size", "prompt", "seed")} == {
        "steps": 5, "width": 640, "height": 448, "batch_size": 2, "prompt": "", "seed": trial_pictures.SEED,
    }  # fmt: skip
    assert asked["do_not_save_samples"] and asked["do_not_save_grid"]
    assert set(asked["override_settings"]) <= set(OPTIONS)
    assert len(made.pass_seconds) == 4 and all(second >= 0 for second in made.pass_seconds)  # from start to start
    assert made.pixels == pictures.make(False, 5).pixels
    assert hooks(host) == [] and host.closed == 2 and host.webui.shared.cmd_opts.no_prompt_history is False


def test_the_switch_is_as_the_user_has_it_afterwards(host, pictures, recording) -> None:
    for wanted in (True, False):
        host.webui.data[ENABLED] = wanted
        for way in (True, False):
            pictures.make(way, 3)
            assert (recording.integration.why_not() == "") is way
        pictures.restore()
        assert (recording.integration.why_not() == "") is wanted
        assert host.webui.shared.state.job == ""


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("x")])
def test_an_error_leaves_the_host_as_it_was(host, pictures, error) -> None:

    def fail():
        raise error

    host.during = lambda: (hooks(host) == ["TrialPictures._make.<locals>.<lambda>"]) and fail()
    with pytest.raises(type(error)):
        pictures.make(False, 3)
    state = host.webui.shared.state
    assert (state.job, state.job_count, hooks(host), host.closed) == ("", 0, [], 1)
    assert host.webui.shared.cmd_opts.no_prompt_history is False


def test_interrupted(host, pictures) -> None:
    state = host.webui.shared.state
    host.during = lambda: setattr(state, "interrupted", True)
    with pytest.raises(Stopped):
        pictures.make(True, 3)
    assert not state.interrupted


def test_only_its_own_job_is_interrupted(host, pictures) -> None:
    state = host.webui.shared.state
    state.interrupt = lambda: setattr(state, "interrupted", True)
    state.begin(job="task(1)")
    pictures.interrupt()
    assert not state.interrupted
    state.end()
    state.begin(job=JOB)
    pictures.interrupt()
    assert state.interrupted
    state.end()


def test_refusals(host, pictures, monkeypatch) -> None:
    assert pictures.refusal() == ""
    monkeypatch.setitem(sys.modules, "modules.sd_unet", SimpleNamespace(current_unet=object()))
    assert pictures.refusal().startswith("another UNet computes in the model's place")
    monkeypatch.setitem(sys.modules, "modules.sd_unet", SimpleNamespace(current_unet=None))
    host.webui.sd_models.model_data.sd_model = None
    assert pictures.refusal() == "no model is loaded yet: make a picture first"


def test_sizes_without_a_picture_before(host, pictures) -> None:
    assert pictures.describe() == "512x512, batch 1"
    host.model.is_sdxl = True
    assert pictures.describe() == "1024x1024, batch 1"


def test_a_whole_trial(host, pictures) -> None:
    trial = Trial(pictures)
    threads: list[threading.Thread] = []

    def thread(**kwargs) -> threading.Thread:
        threads.append(threading.Thread(**kwargs))
        return threads[-1]

    trial._make_thread = thread
    assert trial.start() == (True, "")
    threads[0].join()
    status = trial.status()
    assert status["state"] == "done", status
    assert status["result"]["equal"] and status["result"]["limit_seconds"] == 0.5
    assert host.webui.shared.state.job == "" and not sys.modules["modules.call_queue"].queue_lock.locked()
