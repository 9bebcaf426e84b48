"""An extension for the end-to-end tests only: what lives in the WebUI's process, counted, at GET /webui-probe.

Problem: from outside nobody can tell whether a Reload UI left a second mover behind, whether hooks were installed twice, or
whether memory that still counts as used is held by somebody or only by the allocator. Copy (not link) `probe_extension` into
the `extensions` folder of both servers, the one with Async LowVRAM and the stock one.

Reading it collects garbage and hands free heap pages back to the system first, so that what is left is held by somebody.

GET /webui-sampler tells how long the sampling thread was at it since the last time it was asked: whole guided steps, and in them
the end of each, between two of the host's callbacks, where it stores its latent and decodes the preview.
"""

import ctypes
import gc
import os
import sys
import threading
import time
from collections import Counter

import torch
from modules import lowvram, script_callbacks, sd_models

COUNTED = ("Integration", "AsyncModelMover", "SimulatedStreams", "CudaStreams", "Network", "Streaming", "Unit", "HostMemory")


def trim():
    """Give unused heap back; only glibc has it."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def process_status():
    """Bytes of main memory, by kind, and threads of this process, as the kernel counts them."""
    with open(f"/proc/{os.getpid()}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    kib = {key: int(fields[key].split()[0]) for key in ("VmRSS", "RssAnon", "RssFile") if key in fields}
    return {"threads": int(fields["Threads"]), **{key: value << 10 for key, value in kib.items()}}


def hooks_of(model):
    """How many forward hooks of which origin the modules of `model` carry; the modules that carry any twice."""
    origins, twice = Counter(), 0
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            names = Counter(f"{getattr(hook, '__module__', '?')}.{getattr(hook, '__qualname__', '?')}" for hook in hooks.values())
            origins.update(names)
            twice += sum(count > 1 for count in names.values())
    return dict(origins), twice


def look():
    gc.collect()
    gc.collect()
    trim()
    living, ours, models = Counter(), Counter(), []
    for thing in gc.get_objects():
        kind = type(thing)
        if kind.__name__ == "LatentDiffusion":
            models.append(thing)
        if kind.__name__ in COUNTED and str(kind.__module__).startswith("lib_async_lowvram"):
            ours[kind.__name__] += 1
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            living[f"{kind.__name__} {thing.device}"] += 1
    active = sd_models.model_data.sd_model
    origins, twice = hooks_of(active) if active is not None else ({}, 0)
    return {
        **process_status(),
        "python_threads": dict(Counter(thread.name.split("_")[0].split("-")[0] for thread in threading.enumerate())),
        "ours": dict(ours),
        "living": dict(living),
        "models": len(models),
        "models_loaded": len(sd_models.model_data.loaded_sd_models),
        "hooks": origins,
        "hooked_twice": twice,
        "module_in_gpu": type(lowvram.module_in_gpu).__name__,
        "setup_for_low_vram": f"{lowvram.setup_for_low_vram.__module__}.{lowvram.setup_for_low_vram.__qualname__}",
    }


class SamplerClock:
    """Seconds on the sampling thread, by the host's own callbacks."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.steps, self.step_seconds, self.preview_seconds = 0, 0.0, 0.0
        self.began = self.denoised = None

    def on_begin(self, params):
        self.began, self.denoised = time.perf_counter(), None

    def on_denoised(self, params):
        self.denoised = time.perf_counter()

    def on_end(self, params):
        if self.began is not None and self.denoised is not None:
            now = time.perf_counter()
            self.steps += 1
            self.step_seconds += now - self.began
            self.preview_seconds += now - self.denoised

    def take(self):
        taken = {"steps": self.steps, "step_seconds": self.step_seconds, "preview_seconds": self.preview_seconds}
        self.reset()
        return taken


clock = SamplerClock()


def add_route(demo, app):
    app.add_api_route("/webui-probe", look, methods=["GET"])
    app.add_api_route("/webui-sampler", clock.take, methods=["GET"])


script_callbacks.on_cfg_denoiser(clock.on_begin)
script_callbacks.on_cfg_denoised(clock.on_denoised)
script_callbacks.on_cfg_after_cfg(clock.on_end)
script_callbacks.on_app_started(add_route)
