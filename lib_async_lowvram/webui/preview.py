"""The WebUI's live previews on the preview worker: when one is due, how it is decoded, where it is shown.

Problem: under `--lowvram` the WebUI decodes previews inline, on the sampling thread, and only the first picture of a batch.
Here the sampling thread only submits; everything else the user set stays what it meant: the period (every n steps; -1: once per
batch; 0: none), the method, the grid, the format, both progress endpoints, which all read `State.current_image` as ever.

Inline as before, for the host's own reasons: under `manual_cast` (GTX 16xx, some 8-bit modes), which patches layer classes for
all threads; and for models that the mover does not manage.

Invariants: I6 - switched off, the host's functions are its own again, object for object; an error of ours does not reach the
sampler. A frame is shown only in its job: `new_job` is called before the host resets its state for another one.

Called: `_on_store_latent`, `_on_do_set_current_image` on the sampling thread; `_render`, `_show` on the worker; the rest by
`lowvram.Integration`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.device.streams import Event
from lib_async_lowvram.log import logger
from lib_async_lowvram.preview import Decode, PreviewWorker
from lib_async_lowvram.webui import patching
from lib_async_lowvram.webui.preview_decoders import APPROX_CHEAP, APPROX_NN, FULL, TAESD, CheapDecoder, FullDecoder, network_decoder
from lib_async_lowvram.webui.regions import VAE_DECODE, VAE_ENCODE
from lib_async_lowvram.webui.stock import Link

NOTHING = {"decoded": 0, "skipped": 0, "errors": 0, "submitted": 0, "decode_seconds": 0.0, "submit_seconds": 0.0}


class LivePreviews:
    """`mover`: the one now open, or None. `link_of(model)`: of a managed model, or None."""

    def __init__(
        self, mover: Callable[[], Any], link_of: Callable[[nn.Module | None], Link | None], preview_bytes: Callable[[], int]
    ) -> None:
        self._mover = mover
        self._link_of = link_of
        self._preview_bytes = preview_bytes
        self._host_shared = importlib.import_module("modules.shared")
        self._host_models = importlib.import_module("modules.sd_models")
        self._worker: PreviewWorker | None = None
        self._streams: Any = None
        self._full: FullDecoder | None = None
        self._cheap = CheapDecoder()
        self._patched = False
        self._counted = dict(NOTHING)  # by workers that are gone
        self._peak_bytes = 0  # of weights on the device, on streams that are gone

    # -- on and off ------------------------------------------------------------------------------------------------------
    def _patches(self) -> Iterator[tuple[Any, str, Callable]]:
        yield importlib.import_module("modules.sd_samplers_common"), "store_latent", self._on_store_latent
        yield importlib.import_module("modules.shared_state").State, "do_set_current_image", self._on_do_set_current_image

    def switch(self, on: bool) -> None:
        """Between jobs: the host's functions are ours, or its own again."""
        if on == self._patched:
            return
        for owner, field, handler in self._patches():
            if on:
                patching.put(owner, field, handler)
            else:
                patching.remove(owner, field)
        self._patched = on
        if not on:
            self.close()

    def new_job(self) -> None:
        """A job is about to begin, or has ended."""
        if self._worker is not None:
            self._worker.new_job()

    def quiesce(self) -> None:
        """Models are about to change: nothing of theirs is in use on the worker after this, and no device memory of its own."""
        if self._worker is not None:
            self._worker.quiesce()
        if self._full is not None:
            self._full.rest()

    def give_back(self) -> int:
        """Somebody is out of memory: as `quiesce`. Bytes of weights that previews had on the device."""
        held = self._full.allocated_bytes if self._full is not None else 0
        if held:
            self.quiesce()
        return held

    def close(self) -> None:
        """Stop the worker; it starts again with the next frame. The mover may be closed after this."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
            self._counted = {name: count + getattr(worker.counters, name) for name, count in self._counted.items()}
        full, self._full = self._full, None
        if full is not None:
            full.close()
        self._peak_bytes = self._peak()
        streams, self._streams = self._streams, None
        if streams is not None:
            streams.close()

    def status(self) -> dict[str, Any]:
        """Frames and seconds since the start; the most bytes of weights on the device."""
        worker = self._worker
        counted = {name: count + (getattr(worker.counters, name) if worker is not None else 0) for name, count in self._counted.items()}
        return {**counted, "peak_weight_bytes": self._peak()}

    def recent(self) -> list[tuple[Event, Event]]:
        """Timing events around the newest frames."""
        worker = self._worker
        return worker.recent if worker is not None else []

    def _peak(self) -> int:
        streams = self._streams
        return self._peak_bytes if streams is None else max(self._peak_bytes, streams.peak_allocated_bytes)

    # -- the sampling thread ---------------------------------------------------------------------------------------------
    def _on_store_latent(self, stock: Callable, decoded: torch.Tensor) -> Any:
        shared = self._host_shared
        if not self._takes_part():
            return stock(decoded)
        shared.state.current_latent = decoded
        every = shared.opts.show_progress_every_n_steps
        due = shared.opts.live_previews_enable and every > 0 and shared.state.sampling_step % every == 0
        if due and not shared.parallel_processing_allowed:
            self._submit(decoded, (shared.state.job_no, shared.state.sampling_step))
        return None

    def _on_do_set_current_image(self, stock: Callable, state: Any) -> Any:
        if not self._takes_part():
            return stock(state)
        if state.current_latent is not None:
            self._submit(state.current_latent, None)
            state.current_image_sampling_step = state.sampling_step
        return None

    def _takes_part(self) -> bool:
        return self._mover() is not None and self._link_of(self._host_models.model_data.sd_model) is not None and not casting_by_hand()

    def _submit(self, latents: torch.Tensor, key: Any) -> None:
        worker = self._worker
        if worker is None:
            mover = self._mover()
            self._streams = mover.streams.sibling()
            worker = self._worker = PreviewWorker(self._streams, mover.host, self._render, self._show)
        try:
            decode = self._decoder(latents)
            worker.submit(latents if self._host_shared.opts.show_progress_grid else latents[:1], decode, key)
        except Exception as error:  # TAESD's weights cannot be downloaded, say: a frame less, not a job
            worker.refused(error)

    def _decoder(self, latents: torch.Tensor) -> Decode:
        shared, devices = self._host_shared, importlib.import_module("modules.devices")
        common = importlib.import_module("modules.sd_samplers_common")
        method = common.approximation_indexes.get(shared.opts.show_progress_type, FULL)
        if method == FULL and not shared.opts.live_preview_allow_lowvram_full:
            method = APPROX_NN
        model = self._host_models.model_data.sd_model
        if method == FULL:
            return self._full_decoder(model)
        if method == APPROX_CHEAP:
            return self._cheap(model, latents.shape[1], importlib.import_module("modules.sd_vae_approx").cheap_approximation)
        if method == TAESD:
            network = importlib.import_module("modules.sd_vae_taesd").decoder_model()
        else:
            network = importlib.import_module("modules.sd_vae_approx").model()
        return network_decoder(network, devices.device, devices.dtype, scale=method == TAESD)

    def _full_decoder(self, model: nn.Module) -> Decode:
        names = self._link_of(model).names
        networks = [names[network] for network in (VAE_ENCODE, VAE_DECODE) if network in names]
        if len(networks) < 2:
            raise RuntimeError("the VAE of this model is not on the mover: choose another live preview method")
        full = self._full
        if full is None:
            full = self._full = FullDecoder(self._mover(), self._preview_bytes())
            logger.info("full live previews: the VAE streams through %d MB of its own", self._preview_bytes() >> 20)

        def decode(latents: torch.Tensor) -> torch.Tensor:
            return full.decode(model, networks, latents)

        return decode

    # -- the worker ------------------------------------------------------------------------------------------------------
    def _render(self, pixels: torch.Tensor) -> Any:
        from PIL import Image

        pictures = [Image.fromarray(picture) for picture in pixels.numpy()]
        if self._host_shared.opts.show_progress_grid:
            return importlib.import_module("modules.images").image_grid(pictures)
        return pictures[0]

    def _show(self, picture: Any) -> None:
        self._host_shared.state.assign_current_image(picture)


def casting_by_hand() -> bool:
    """Whether the host's `manual_cast` is in force now: it keeps each layer class's own forward under this name meanwhile."""
    return hasattr(nn.Linear, "org_forward")
