"""The WebUI's `--lowvram` on the mover: one integration for the process, from the extension's start to its unloading.

Problem: the WebUI loads, switches, keeps, trashes and reloads models in a dozen ways, from several threads, and other
extensions call `modules.lowvram` directly. The integration follows all of it through patched functions of the host and stock's own
hooks (`stock`), and hands each network of each live model to one mover: one ring, one budget, one pinned limit.

Invariants: I6 - switched off, demoted or closed, every model has stock's own hook objects back, all weights are on the host
and `module_in_gpu` is None; a failure of ours while following the host ends there too, never in the host. I7 - models are
held weakly; the integration itself is anchored in the patched functions, so scripts that are run again find it.

Threads: setup on the loading thread, passes and jobs on the thread that computes, `send_everything_to_cpu` and trash on any.
`_lock` guards the list of models; the mover has its own lock and defers to a safe point by itself.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.claims import Refused
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.log import logger
from lib_async_lowvram.webui import patching
from lib_async_lowvram.webui.answers import Answers
from lib_async_lowvram.webui.attention import SliceKeeper
from lib_async_lowvram.webui.device_claim import DeviceClaim
from lib_async_lowvram.webui.host import Host
from lib_async_lowvram.webui.large_jobs import LargeJobs
from lib_async_lowvram.webui.lora import LoraBackups
from lib_async_lowvram.webui.models import ManagedModels
from lib_async_lowvram.webui.next_network import expected_after
from lib_async_lowvram.webui.preview import LivePreviews
from lib_async_lowvram.webui.regions import UNET
from lib_async_lowvram.webui.retry import Retries
from lib_async_lowvram.webui.settings import SettingsReader
from lib_async_lowvram.webui.stock import Link, harvest, vae_originals
from lib_async_lowvram.webui.upscalers import Upscalers


def open_mover(config: OffloadConfig, device: torch.device | str) -> Any:
    """The real mover."""
    from lib_async_lowvram.mover import AsyncModelMover

    return AsyncModelMover(config, device)


class Integration(Answers):
    """See the module's docstring. `make_mover`: from the config and the device."""

    def __init__(
        self,
        host: Host,
        settings: SettingsReader | None = None,
        make_mover: Callable[[OffloadConfig, torch.device | str], Any] = open_mover,
    ) -> None:
        self.host = host
        self.settings = settings or SettingsReader()
        self._make_mover = make_mover
        self._host_lowvram = importlib.import_module("modules.lowvram")
        self._host_shared = importlib.import_module("modules.shared")
        self._host_models = importlib.import_module("modules.sd_models")
        self._models = ManagedModels(self, self._open_mover, lambda: self._host_lowvram.send_everything_to_cpu())
        self._config: OffloadConfig | None = None
        self._enabled = self.settings.enabled()
        self._forced: bool | None = None
        self._demoted: str | None = None
        self._last_error: str | None = None
        self._known: Any = None
        self._in_job = False
        self._closing = False
        self._device = DeviceClaim(self._host_lowvram, self._drain)
        self._lora = LoraBackups(lambda: getattr(self._models.mover, "backups", None))
        self._upscalers = Upscalers(lambda: self._protected("making room for an upscaler", self._drain))
        self._previews = LivePreviews(lambda: self._models.mover, self._link_of, lambda: self.settings.config().preview_bytes)
        self._retries = Retries(host.device, self._unet_of, self._make_room)
        self.large = LargeJobs.over(self._models, lambda: self.settings.config(), self.why_not)
        self._lock = threading.RLock()

    def _link_of(self, model: nn.Module | None) -> Link | None:
        managed = self._models.find(model)
        return None if managed is None else managed.link

    def _unet_of(self, model: nn.Module) -> str | None:
        link = self._link_of(model)
        return None if link is None else link.names[UNET]

    def _make_room(self, name: str) -> int:
        return self._previews.give_back() + self._models.mover.shed(name)

    def _open_mover(self) -> Any:
        self._config = self.settings.config()
        mover = self._make_mover(self._config, self.host.mover_device)
        mover.on_demote = self._on_demote
        mover.keep_free = SliceKeeper(self._host_shared, self._host_models)
        if self._known is not None:
            mover.known = self._known  # switched off and on again: nothing has to be measured anew
        self._known = mover.known
        return mover

    # -- start and end ---------------------------------------------------------------------------------------------------
    @classmethod
    def start(cls, host: Host, **kwargs: Any) -> Integration:
        """The process's integration: the one already there (scripts were run again), else a new one. Adopts loaded models."""
        setup = patching.handler_of(importlib.import_module("modules.lowvram"), "setup_for_low_vram")
        running = getattr(setup, "__self__", None)
        if isinstance(running, cls):
            running._closing = False
        else:
            running = cls(host, **kwargs)
            for owner, field, handler in running._patches():
                patching.put(owner, field, handler)
        running.adopt_loaded()
        if not running._in_job:
            running._follow_previews()
        return running

    def _patches(self) -> Iterator[tuple[Any, str, Callable]]:
        state = importlib.import_module("modules.shared_state").State
        yield self._host_lowvram, "setup_for_low_vram", self._on_setup
        yield self._host_lowvram, "send_everything_to_cpu", self._on_send_everything_to_cpu
        yield importlib.import_module("modules.devices"), "torch_gc", self._on_torch_gc
        yield self._host_models, "send_model_to_trash", self._on_trash
        yield self._host_models, "load_model", self._on_load
        yield state, "begin", self._on_begin
        yield state, "end", self._on_end
        yield from self._lora.patches()
        yield from self._upscalers.patches()

    def close(self) -> None:
        """Give the host back as it was. During a job this waits for the job's end: its thread may be inside a pass."""
        with self._lock:
            self._closing = True
            if not self._in_job:
                self._close_now()

    def _close_now(self) -> None:
        self._closing = False
        self.large.end()
        try:
            self._previews.switch(False)
            self._models.close()
        finally:
            self._stock_again()
            for owner, field, _ in self._patches():
                patching.remove(owner, field)

    # -- models ------------------------------------------------------------------------------------------------------------
    def adopt(self, sd_model: nn.Module, originals: dict[str, Callable] | None = None) -> None:
        """Take over a model that stock has set up. Does nothing for one already managed, or that stock left alone."""
        with self._lock:
            if not self._enabled or self._demoted or self._models.find(sd_model) is not None:
                return
            if any(parameter.is_meta for parameter in sd_model.parameters()):
                return  # trashed: there is nothing to move any more
            self._protected("taking over a model", lambda: self._models.adopt(harvest(sd_model, originals)))
            if self._models.find(sd_model) is not None:
                self._retries.watch(sd_model)

    def adopt_loaded(self) -> None:
        """Take over models that were loaded before us (Reload UI, the option switched on)."""
        data = self._host_models.model_data  # not shared.sd_model: reading that may load a model
        for model in {id(model): model for model in (data.sd_model, *data.loaded_sd_models) if model is not None}.values():
            if getattr(model, "lowvram", False):
                self.adopt(model)

    def _stock_again(self) -> None:
        """Once the last model has been given back."""
        if not self._models:
            self._device.give_up()
            self._retries.unwatch()

    # -- passes: called by the stand-ins, on the thread that computes ------------------------------------------------------
    def pass_starting(self, link: Link, network: str) -> None:
        self._device.claim(unet_pass=network == UNET)
        self._read_settings()
        following = expected_after(network, link.names, self._host_shared)
        if following is not None:
            self._models.mover.expect(following)

    def _read_settings(self) -> None:
        config = self.settings.config()
        if config is not self._config:
            self._config = config
            self._models.mover.configure(config)

    def region_entered(self, link: Link) -> None:
        self._device.region_entered()

    @contextmanager
    def vae_pass(self, link: Link, method: str) -> Iterator[None]:
        network, mover = f"vae_{method}", self._models.mover
        self.pass_starting(link, network)
        vae = self._models.model_of(link).first_stage_model
        with mover.running(link.names[network]), self.large.around_vae(vae, method, mover.streams, mover.host):
            yield

    def prepare(self) -> None:
        """Sampling is about to start: the first onloads of the UNet get under way now."""
        managed = self._models.find(self._host_models.model_data.sd_model)
        if managed is not None:
            self._protected("preparing the UNet", lambda: self._prepare(managed.link))

    def _prepare(self, link: Link) -> None:
        mover, name = self._models.mover, link.names[UNET]
        if mover.current_network != name:
            mover.drain(for_network=name)  # a pass without an end (SD2's text encoder) would be in the way; we know that it is over
        self._device.claim()
        self._read_settings()
        mover.prepare(name)

    # -- the device is wanted by somebody else -----------------------------------------------------------------------------
    def _drain(self) -> None:
        if self._models.mover is not None:
            self._models.mover.drain()

    def _on_send_everything_to_cpu(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        if not self._device.unet_is_starting:
            self._protected("quieting previews", self._previews.quiesce)  # models are about to change, or the batch is over
        self._device.leave()  # also when another extension has written None to module_in_gpu, so that stock has nothing to move
        self._device.give_up()
        return stock(*args, **kwargs)

    def _on_torch_gc(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        state = self._host_shared.state
        if self._in_job and state.job == "" and state.job_count == 0:
            self._job_over()  # a job that raised: the host resets its state and collects, but never calls State.end
        if self._models.mover is not None:
            streams = self._models.mover.streams
            for stream in (streams.onload_stream, streams.offload_stream):
                reached = streams.record(stream)
                if not streams.done(reached):  # blocks given back while a copy was under way are free only after it
                    streams.synchronize(reached)
        return stock(*args, **kwargs)

    def _on_setup(self, stock: Callable, sd_model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        originals = None if getattr(sd_model, "lowvram", False) else vae_originals(sd_model)
        result = stock(sd_model, *args, **kwargs)
        self.adopt(sd_model, originals)
        return result

    def _on_load(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        finally:
            # The empty prompt has just been encoded, outside any job; another thread may be the next to change weights, and
            # would find a text encoder that never says that it is done (SD2's) still in use by this one. One that has said so
            # stays on the device, as under stock, for the prompt that comes next.
            if self._models.mover is not None and self._models.mover.in_pass:
                self._drain()

    def _on_trash(self, stock: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            managed = self._models.find(model)
            if managed is not None:
                self._protected("giving back a model that is thrown away", lambda: self._models.release([managed]))
                self._stock_again()
        return stock(model, *args, **kwargs)

    # -- jobs ----------------------------------------------------------------------------------------------------------------
    def _on_begin(self, stock: Callable, state: Any, *args: Any, **kwargs: Any) -> Any:
        self._protected("starting a job", self._job_starting)
        return stock(state, *args, **kwargs)

    def _on_end(self, stock: Callable, state: Any, *args: Any, **kwargs: Any) -> Any:
        self._job_over()
        return stock(state, *args, **kwargs)

    def _job_starting(self) -> None:
        self._previews.new_job()
        with self._lock:
            self._models.forget_dead()
            if self._in_job:
                self._drain()  # the job before never ended
            self._in_job = True
            self._follow_switch()

    def follow_switch(self) -> None:
        """The switch may be another one for the next picture of this job (X/Y/Z plot): called before its prompt is encoded."""
        if self._wanted() != self._enabled:
            self._protected("following the switch", self._drain)
            self._protected("following the switch", self._follow_switch)

    def force(self, on: bool | None) -> None:
        """From the next job on the switch is on, or off, whatever the settings say; None: as they say."""
        self._forced = on

    def _wanted(self) -> bool:
        return self.settings.enabled() if self._forced is None else self._forced

    def _follow_switch(self) -> None:
        with self._lock:
            wanted, before = self._wanted(), self._enabled
            self._enabled = wanted
            self._follow_previews()
            if wanted and not before:
                self.adopt_loaded()
                logger.info("switched on: weights travel while the GPU computes")
            elif before and not wanted:
                self._models.close()  # its threads, too; and a mover that was demoted stays so, the next one starts anew
                self._demoted = None
                self._stock_again()
                logger.info("switched off: stock --lowvram moves the weights")
            if wanted or wanted == before:
                self._models.keep_on_disk(self.settings.on_disk())

    def _follow_previews(self) -> None:
        self._previews.switch(self._enabled and not self._demoted and self.settings.previews())

    def _job_over(self) -> None:
        self._previews.new_job()
        self.large.end()
        with self._lock:
            self._device.job_over()
            self._protected("closing a job", self._drain)
            self._in_job = False
            if self._closing:
                self._close_now()

    # -- faults --------------------------------------------------------------------------------------------------------------
    def _on_demote(self, reason: str) -> None:
        with self._lock:
            self._demoted = reason
            logger.warning("%s: stock --lowvram moves the weights from here on; switch the option off and on to try again", reason)
            self._previews.switch(False)
            self._models.release_all()
            self._stock_again()

    def _protected(self, what: str, action: Callable[[], None]) -> None:
        """Run bookkeeping of ours; when it fails, the host goes on with stock (I6)."""
        try:
            action()
        except Exception as error:
            # Without the error's text, which may hold anything: this goes to the status route as well. Refusals are our own words.
            told = error if isinstance(error, Refused) else type(error).__name__
            self._last_error = f"failed while {what} ({told})"
            importlib.import_module("modules.errors").report(f"[Async LowVRAM] failed while {what}", exc_info=True)
            self._on_demote(self._last_error)
