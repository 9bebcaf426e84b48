"""Tiled denoising in the WebUI: for the steps of one job, the model's `apply_model` runs its tiles.

Problem: samplers of several families, CFG that batches its conditions or does not, refiners that change the model between two steps,
passes of hires fix: all of them come down to `CFGDenoiser.forward`, once per step, and in it to calls of the model's `apply_model`
with a part of the rows each. Inside those, everything is pointwise in the latent's plane but the UNet. So:

- `CFGDenoiser.forward` is patched while a job is open. It tells what the rows of the calls to come are for, and puts a function in
  front of `apply_model` *on the model's instance* for the length of that step; `apply_refiner`, which may change the model within
  it, is patched to follow. No class of a model is touched.
- On the instance means in front of whatever is patched on the class, and that is the order that `retry` needs: what runs out of
  memory is repeated as one call, with a group of tiles, with fewer residents; when that fails too, `TiledDenoiser` halves the group.
- Masks, noise, callbacks and previews see whole latents, as ever.

What is not tiled, and said (log, and under the picture): a UNet whose whole call another extension has replaced (ControlNet gives it
hints of the whole picture's size), and conditions with an extent of their own (`CannotTile`). Those steps run as stock runs them.

Invariants: I6 - between jobs nothing is patched, and a job whose pictures need no tiles makes the very calls of stock. I7 - the model
is held for the length of a step only.

Threads: `begin`, `end` and the steps are the sampling thread's; `status` any.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.large import chunks, memory
from lib_async_lowvram.large.pieces import pieces
from lib_async_lowvram.large.settings import AUTOMATIC, LargePictures
from lib_async_lowvram.large.spatial import CannotTile
from lib_async_lowvram.large.tile_choice import CELL, choose
from lib_async_lowvram.large.tiled_denoiser import TiledDenoiser
from lib_async_lowvram.log import logger
from lib_async_lowvram.webui import patching
from lib_async_lowvram.webui.large_prompts import CONDITION, UNCONDITIONAL, RegionPrompts
from lib_async_lowvram.webui.memory_errors import out_of_memory

METHOD = "apply_model"

STEERED = "another extension steers the UNet as a whole (ControlNet does): this picture is made without tiles and regions"


class Plan:
    """How calls of one size are made. chunks: of the UNet's parts, within a call."""

    def __init__(self, tiled: TiledDenoiser, chunks: int) -> None:
        self.tiled = tiled
        self.chunks = chunks


class Job:
    """One job of the host. `room(model)`: bytes that activations of its UNet may take. `hold`: as `chunks.in_chunks` takes it.

    Attributes:
        refused: why nothing is tiled any more, or "".
    """

    def __init__(self, p: Any, settings: LargePictures, room: Callable[[nn.Module], int], hold: chunks.Hold) -> None:
        self.p = p
        self.hold = hold
        self.settings = settings
        self.refused = ""
        self._room = room
        self._plans: dict[tuple, Plan] = {}
        self.prompts = RegionPrompts(p, settings.regions) if settings.regions else None
        for note in self.prompts.notes if self.prompts is not None else ():
            self.say(note)

    def say(self, text: str) -> None:
        """In the log, and under the picture."""
        logger.warning("large pictures: %s", text)
        self.p.comment(f"Large pictures: {text}")

    def refuse(self, reason: str) -> None:
        """Nothing is tiled from here on."""
        if not self.refused:
            self.refused = reason
            self.say(reason)

    @property
    def plans(self) -> list[Plan]:
        return list(self._plans.values())

    def may_tile(self) -> bool:
        """The first pass of hires fix is made whole: it is the small picture that guides the second one. Its regions count."""
        return not getattr(self.p, "enable_hr", False) or bool(getattr(self.p, "is_hr_pass", False))

    def plan(self, model: nn.Module, latent: torch.Tensor) -> Plan:
        """For a call with this latent; the same for all calls of its size, by the same model."""
        unet = model.model.diffusion_model
        key = (id(unet), tuple(latent.shape), self.may_tile())
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._make(model, unet, latent)
        return found

    def _make(self, model: nn.Module, unet: nn.Module, latent: torch.Tensor) -> Plan:
        batch, (height, width) = latent.shape[0], latent.shape[-2:]
        settings, room = self.settings, self._room(model)
        try:
            kept = memory.kept(unet, _value_bytes(unet))
        except ValueError as error:
            kept = None
            logger.info("large pictures: %s; its tiles are computed one by one", error)
        size, overlap = (height, width), 0
        if self.may_tile():
            asked = None if settings.tile is None else settings.tile // CELL
            size, overlap = choose(
                kept, height, width, batch, room, asked, lambda cells: settings.overlap_of(cells * CELL) // CELL,
                sdxl=bool(getattr(model, "is_sdxl", False)), smaller=settings.mode != AUTOMATIC,
            )  # fmt: skip
        made = pieces(height, width, size, overlap, settings.regions)
        tile = made[0].tile
        number, in_chunks = 1, 1
        if kept is not None:
            grouped = memory.group(kept, len(made), batch, tile.height, tile.width, room)
            number, in_chunks = grouped.pieces, grouped.chunks
        plan = Plan(TiledDenoiser(made, number, out_of_memory), in_chunks)
        if not plan.tiled.untiled:
            logger.info(
                "large pictures: %d x %d in %d tiles of %d x %d cells, %d to a call, in %d chunks",
                width, height, len(made), tile.width, tile.height, number, in_chunks,
            )  # fmt: skip
        return plan


def _value_bytes(unet: nn.Module) -> int:
    """Of an element of the activations: the host may store weights in eight bits, and compute in more than they have."""
    devices = importlib.import_module("modules.devices")
    dtype = getattr(devices, "dtype_unet", None) or next(unet.parameters()).dtype
    return 4 if getattr(devices, "unet_needs_upcast", False) else max(2, torch.empty((), dtype=dtype).element_size())


class Step:
    """One call of `CFGDenoiser.forward`: what the rows of the model's calls in it are for."""

    def __init__(self, denoiser: Any, job: Job, cond: Any, uncond: Any) -> None:
        self._job = job
        self._step = int(getattr(denoiser, "step", 0))
        edit = importlib.import_module("modules.sd_models").model_data.sd_model
        scale = getattr(denoiser, "image_cfg_scale", None)
        twice = getattr(edit, "cond_stage_key", "") == "edit" and scale is not None and scale != 1.0
        self._kinds = [CONDITION] * sum(len(each) for each in cond.batch) + [UNCONDITIONAL] * len(uncond) * (2 if twice else 1)
        self._reached = 0

    def apply(self, model: nn.Module, inner: Callable, latent: torch.Tensor, times: torch.Tensor, cond: Any, **more: Any) -> torch.Tensor:
        """`apply_model` of one part of the rows."""
        job, unet = self._job, model.model.diffusion_model
        kinds = self._kinds[self._reached : self._reached + latent.shape[0]]
        self._reached += latent.shape[0]
        if job.refused or torch.is_grad_enabled():
            return inner(latent, times, cond, **more)
        plan = job.plan(model, latent)
        if plan.tiled.untiled and plan.chunks == 1:
            return inner(latent, times, cond, **more)
        if "forward" in vars(unet):
            job.refuse(STEERED)
            return inner(latent, times, cond, **more)

        def call(*given: Any) -> torch.Tensor:
            with chunks.in_chunks(unet, plan.chunks, hold=job.hold):
                return inner(*given, **more)

        def prompts(sources: Any, given: Any) -> Any:
            if len(kinds) != latent.shape[0]:
                raise CannotTile(f"a call with {latent.shape[0]} rows, where {len(kinds)} were expected")
            job.prompts.encode(model)
            return job.prompts.conditions(sources, given, kinds, self._step, model)

        while True:
            try:
                return plan.tiled(call, latent, times, cond, prompts)
            except CannotTile as error:
                job.refuse(f"{error}: this picture is made without tiles and regions")
                return inner(latent, times, cond, **more)
            except chunks.CannotChunk as error:
                logger.warning("large pictures: %s; tiles are computed one by one", error)
                plan.chunks = plan.tiled.group = 1


class LargeDenoise:
    """See the module. `room`, `hold`: as `Job` takes them, for models in general."""

    def __init__(self, room: Callable[[nn.Module], int], hold: chunks.Hold = chunks.no_hold) -> None:
        self._room = room
        self._hold = hold
        self._job: Job | None = None
        self._patched: list[tuple[Any, str]] = []
        self._step: Step | None = None
        self._attached: list[tuple[nn.Module, Any, Callable]] = []

    # -- jobs ----------------------------------------------------------------------------------------------------------
    def begin(self, p: Any, settings: LargePictures) -> None:
        """From now on steps of `p` are tiled as `settings` say; where those are off, nothing is. A job that is open is ended."""
        self.end()
        if settings.off:
            return
        self._job = Job(p, settings, self._room, self._hold)
        denoiser = importlib.import_module("modules.sd_samplers_cfg_denoiser").CFGDenoiser
        for owner, field, handler in (
            (denoiser, "forward", self._on_forward),
            (importlib.import_module("modules.sd_samplers_common"), "apply_refiner", self._on_apply_refiner),
        ):
            patching.put(owner, field, handler)
            self._patched.append((owner, field))

    def end(self) -> None:
        """The host's own functions are back."""
        self._job = None
        while self._patched:
            patching.remove(*self._patched.pop())

    def status(self) -> dict[str, Any] | None:
        """Of the open job: None where there is none. calls: of the UNet, so far."""
        job = self._job
        if job is None:
            return None
        return {
            "mode": job.settings.mode,
            "refused": job.refused,
            "sizes": [
                {
                    "tiles": len(plan.tiled.pieces),
                    "at_once": plan.tiled.group,
                    "chunks": plan.chunks,
                    "calls": plan.tiled.calls,
                    "halved": plan.tiled.halved,
                }
                for plan in job.plans
            ],
        }

    # -- steps ---------------------------------------------------------------------------------------------------------
    def _on_forward(self, stock: Callable, denoiser: Any, x: Any, sigma: Any, uncond: Any, cond: Any, *args: Any, **kwargs: Any) -> Any:
        job = self._job
        if job is None or job.refused or getattr(denoiser, "p", None) is not job.p:
            return stock(denoiser, x, sigma, uncond, cond, *args, **kwargs)
        with self._stepping(Step(denoiser, job, cond, uncond)):
            return stock(denoiser, x, sigma, uncond, cond, *args, **kwargs)

    @contextmanager
    def _stepping(self, step: Step) -> Iterator[None]:
        self._step = step
        self._attach()
        try:
            yield
        finally:
            self._step = None
            self._detach()

    def _on_apply_refiner(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        changed = stock(*args, **kwargs)
        if changed and self._step is not None:
            self._detach()
            self._attach()
        return changed

    def _attach(self) -> None:
        """In front of the present model's `apply_model`. A model without a UNet of the usual layout is left alone."""
        model = importlib.import_module("modules.sd_models").model_data.sd_model
        step = self._step
        if getattr(getattr(model, "model", None), "diffusion_model", None) is None or not hasattr(model, METHOD):
            return
        inner = getattr(model, METHOD)

        def tiled(x: torch.Tensor, t: torch.Tensor, cond: Any, **more: Any) -> torch.Tensor:
            return step.apply(model, inner, x, t, cond, **more)

        self._attached.append((model, vars(model).get(METHOD), tiled))
        setattr(model, METHOD, tiled)

    def _detach(self) -> None:
        while self._attached:
            model, before, ours = self._attached.pop()
            if vars(model).get(METHOD) is not ours:
                logger.warning("large pictures: somebody replaced the model's %s within a step; it is left as it is", METHOD)
            elif before is None:
                delattr(model, METHOD)
            else:
                setattr(model, METHOD, before)
