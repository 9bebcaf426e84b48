"""The pictures of a trial: made by the host itself, the same every time but for how weights move.

Problem: only the host knows how to call its models - SDXL's size vector, an inpainting model's mask, attention, precision - so a trial
makes real pictures through `process_images`, at the size last used, and times the calls of the UNet. Nothing of it stays: no file, no
entry in the prompt history, no preview, and no script takes part.

Invariants: each picture is a job of its own, since the switch counts between jobs; the host's state is as after any job, also after an
error. Called on the trial's thread, with the host's queue held (`trial`).
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lib_async_lowvram.webui.simulated_stock import StocksMoves
from lib_async_lowvram.webui.trial import Made, Stopped

JOB = "async_lowvram_trial"

SEED = 1

SAMPLER = "Euler"
"""One pass per step."""

OPTIONS = {"live_previews_enable": False, "samples_save": False, "grid_save": False, "sd_vae_decode_method": "Full"}


@dataclass(frozen=True)
class Size:
    """Of the job last made. Pixels, pictures."""

    width: int
    height: int
    batch: int


class TrialPictures:
    """See `trial.Pictures`. `force(way)`: how weights move from the next job on, None: as the settings say. `why_not()`: why they cannot
    move asynchronously, or "". `limit()`: the limit per pass of the network used last, seconds. `device`: what computes, and
    whether it is simulated."""

    def __init__(
        self,
        force: Callable[[bool | None], None],
        why_not: Callable[[], str],
        limit: Callable[[], float | None],
        device: torch.device,
        simulated: bool,
    ) -> None:
        self._force = force
        self._why_not = why_not
        self._limit = limit
        self._device = device
        self._simulated = simulated
        self._last: Size | None = None
        self._host_shared = importlib.import_module("modules.shared")
        self._host_models = importlib.import_module("modules.sd_models")

    def note(self, p: Any) -> None:
        """A picture of the user's is about to be sampled."""
        self._last = Size(int(p.width), int(p.height), int(p.batch_size))

    def queue(self) -> AbstractContextManager[Any]:
        """See `trial.Pictures`."""
        return importlib.import_module("modules.call_queue").queue_lock

    def refusal(self) -> str:
        """See `trial.Pictures`."""
        if self._host_models.model_data.sd_model is None:
            return "no model is loaded yet: make a picture first"
        if getattr(sys.modules.get("modules.sd_unet"), "current_unet", None) is not None:
            return "another UNet computes in the model's place (Settings, SD Unet), with weights of its own"
        return self._why_not()

    def size(self) -> Size:
        """As last used; else what the model was made for."""
        if self._last is not None:
            return self._last
        side = 1024 if getattr(self._host_models.model_data.sd_model, "is_sdxl", False) else 512
        return Size(side, side, 1)

    def describe(self) -> str:
        """See `trial.Pictures`."""
        size = self.size()
        return f"{size.width}x{size.height}, batch {size.batch}"

    def limit_seconds(self) -> float | None:
        """See `trial.Pictures`."""
        return self._limit()

    def interrupt(self) -> None:
        """See `trial.Pictures`."""
        if self._host_shared.state.job == JOB:
            self._host_shared.state.interrupt()

    def restore(self) -> None:
        """See `trial.Pictures`."""
        self._force(None)
        self._host_shared.state.begin(job=JOB)  # an empty job: it is at a job's start that the switch counts
        self._host_shared.state.end()

    def make(self, asynchronous: bool, steps: int) -> Made:
        """See `trial.Pictures`."""
        state, model = self._host_shared.state, self._host_models.model_data.sd_model
        if model is None:
            raise RuntimeError("the model is gone")
        self._force(asynchronous)
        state.begin(job=JOB)
        try:
            with self._stocks_moves(model) if not asynchronous else nullcontext():
                made = self._make(model, steps)
            refused = self._why_not() if asynchronous else ""
            if refused:  # given way to stock in the middle of it, say
                raise RuntimeError(refused)
            return made
        finally:
            interrupted = state.interrupted or getattr(state, "stopping_generation", False)  # which came with WebUI 1.9
            state.end()
            state.skipped = state.interrupted = state.stopping_generation = False
            if interrupted:
                raise Stopped

    def _make(self, model: Any, steps: int) -> Made:
        processing = importlib.import_module("modules.processing")
        options = self._host_shared.cmd_opts
        size = self.size()
        p = processing.StableDiffusionProcessingTxt2Img(
            sd_model=model,
            prompt="",
            negative_prompt="",
            seed=SEED,
            sampler_name=SAMPLER,
            batch_size=size.batch,
            n_iter=1,
            steps=steps,
            width=size.width,
            height=size.height,
            do_not_save_samples=True,
            do_not_save_grid=True,
            override_settings={key: value for key, value in OPTIONS.items() if key in self._host_shared.opts.data_labels},
        )
        starts: list[Any] = []
        handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, arguments: starts.append(self._now()))
        history, options.no_prompt_history = getattr(options, "no_prompt_history", False), True
        try:
            processed = processing.process_images(p)
        finally:
            options.no_prompt_history = history
            handle.remove()
            p.close()
        if self._host_shared.state.interrupted:
            raise Stopped
        if len(starts) < 2 or not processed.images:
            raise RuntimeError("the WebUI made no picture")
        return Made(self._between(starts), b"".join(image.tobytes() for image in processed.images))

    def _stocks_moves(self, model: Any) -> AbstractContextManager[Any]:
        """On the simulated device, whose host thinks that it is on a CPU, stock's moves would cost nothing."""
        root = model.model.diffusion_model
        return StocksMoves(root) if self._simulated and getattr(self._host_shared.cmd_opts, "lowvram", False) else nullcontext()

    def _now(self) -> Any:
        """This moment on the device's own clock, without waiting for it."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, moments: list[Any]) -> list[float]:
        pairs = zip(moments, moments[1:], strict=False)
        if self._device.type != "cuda":
            return [end - start for start, end in pairs]
        moments[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]  # torch gives milliseconds
