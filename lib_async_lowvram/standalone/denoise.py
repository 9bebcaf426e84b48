"""From noise to latent: a sampler's steps, each of them tile by tile within the memory that activations may take.

Problem: the same as in the WebUI (`large.tiled_denoiser`), around diffusers' classes: the UNet is called with groups of tiles, in chunks of
the batch inside (`large.chunks`), whose weights stay while their chunks run.

Samplers see whole latents in float32 on the host, whatever the UNet computes in: their sums are over all steps, and cost nothing.

On the thread that computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from lib_async_lowvram.large import chunks, diffusers_unet, memory
from lib_async_lowvram.large.pieces import pieces
from lib_async_lowvram.large.settings import ON, LargePictures
from lib_async_lowvram.large.tile_choice import choose
from lib_async_lowvram.large.tiled_denoiser import TiledDenoiser
from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.networks import Networks, chunk_roots
from lib_async_lowvram.standalone.prompts import Encoded
from lib_async_lowvram.standalone.request import CELL, Request

Moved = Callable[[float], None]
"""(share of the UNet's calls that are done)"""


@dataclass
class Tiling:
    """How each step is made. chunks: of the UNet's parts within a call. needed_bytes: of activations, for one call, by formula."""

    denoiser: TiledDenoiser
    chunks: int
    needed_bytes: int

    def describe(self) -> str:
        made = self.denoiser.pieces
        tile = made[0].tile
        whole = f"{len(made)} tile{'s' * (len(made) > 1)} of {tile.width * CELL} x {tile.height * CELL} pixels"
        return f"{whole}, {min(self.denoiser.group, len(made))} to a call in {self.chunks} chunks"


def tiling(networks: Networks, request: Request, itemsize: int, free_bytes: int) -> Tiling:
    """For pictures of the request's size, where activations of values of `itemsize` bytes may take `free_bytes`. `CannotMake` where not
    even the smallest tile fits."""
    kept = diffusers_unet.kept(networks.unet, itemsize)
    height, width = request.cells
    asked = None if request.tile is None else request.tile // CELL
    overlap_of = LargePictures(ON).overlap_of
    size, overlap = choose(
        kept, height, width, request.conditions, free_bytes, asked, lambda cells: overlap_of(cells * CELL) // CELL,
        sdxl=networks.family.sdxl, smaller=False,
    )  # fmt: skip
    made = pieces(height, width, size, overlap)
    tile = made[0].tile
    grouped = memory.group(kept, len(made), request.conditions, tile.height, tile.width, free_bytes)
    if grouped.needed_bytes > free_bytes:
        needed, free = grouped.needed_bytes >> 20, free_bytes >> 20
        raise CannotMake(f"tiles of {tile.width * CELL} pixels need {needed} MB of activations, of which {free} MB are left: more --memory")
    return Tiling(TiledDenoiser(made, grouped.pieces, _out_of_memory), grouped.chunks, grouped.needed_bytes)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.cuda.OutOfMemoryError)


def denoise(
    networks: Networks,
    request: Request,
    scheduler: Any,
    timesteps: torch.Tensor,
    latent: torch.Tensor,
    encoded: Encoded,
    plan: Tiling,
    generator: torch.Generator,
    computing: tuple[torch.device, torch.dtype],
    around: Callable[[], AbstractContextManager],
    hold: chunks.Hold,
    moved: Moved,
) -> torch.Tensor:
    """The latent [1, 4, rows, columns] (float32, on the host) after all `timesteps` of a scheduler that is set to them. `latent`: noise,
    or a noised picture, as it goes into the first. `around`: open during each call of the UNet. `hold`: as `chunks.in_chunks` takes it."""
    device, dtype = computing
    given = _accepted(scheduler.step, {"generator": generator})
    conditions: dict[str, Any] = {"encoder_hidden_states": encoded.states}
    if encoded.more is not None:
        conditions["added_cond_kwargs"] = encoded.more
    roots, limit = chunk_roots(networks.unet), chunks.automatic_limit(networks.unet)
    denoiser, done = plan.denoiser, 0

    def apply(inputs: torch.Tensor, time: torch.Tensor, cond: dict[str, Any]) -> torch.Tensor:
        nonlocal done
        with ExitStack() as open_now:
            for root in roots:
                open_now.enter_context(chunks.in_chunks(root, plan.chunks, limit, hold))
            open_now.enter_context(around())
            predicted = networks.unet(inputs, time, return_dict=False, **cond)[0]
        done += 1
        left = len(timesteps) * -(-len(denoiser.pieces) // denoiser.group)
        moved(done / max(left, done))
        return predicted

    moved(0.0)  # the time left is reckoned from here
    for time in timesteps:
        sample = scheduler.scale_model_input(torch.cat([latent] * request.conditions), time)
        sample = sample.to(device=device, dtype=dtype)
        predicted = denoiser(apply, sample, time.to(device), conditions).float().cpu()
        if request.conditions == 2:
            without, wanted = predicted.chunk(2)
            predicted = without + request.cfg * (wanted - without)
        latent = scheduler.step(predicted, time, latent, **given).prev_sample
    return latent


def _accepted(function: Callable, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that a sampler's `step` takes."""
    taken = inspect.signature(function).parameters
    return {key: value for key, value in arguments.items() if key in taken}
