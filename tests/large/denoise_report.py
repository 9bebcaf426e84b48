"""Tiled denoising in figures: bytes streamed per step for a large picture against a small one, and what its activations take.

    python -m tests.large.denoise_report [--channels 32]

Streaming is counted by the mover on the simulated device, with an SD1.5-shaped UNet of reduced width under a budget of the same share
of its weights; tiles are as small as that UNet allows, as many as a real picture has, since bytes do not depend on their size.
Activations are of the exact SD1.5 in half precision, from runs on shapes alone (`shape_run`: fused attention; weights, VAE and what
kernels and the allocator take for themselves not counted).
"""

from __future__ import annotations

import argparse
import time

import torch

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.bench.shapes import sd15_shape
from lib_async_lowvram.bench.unet import empty_unet, regions, sd15
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.large.chunks import automatic_limit, in_chunks, parts, weight_bytes
from lib_async_lowvram.large.memory import group, kept
from lib_async_lowvram.large.pieces import pieces
from lib_async_lowvram.large.settings import LargePictures
from lib_async_lowvram.large.tile_choice import choose
from lib_async_lowvram.large.tiled_denoiser import TiledDenoiser
from tests.large.shape_run import peak_bytes

MB = 1 << 20
MARK = 800 * MB
STEPS = 6
"""Of each picture, one after the other: the first one with other chunks than the last had must be no different."""

LEAST_WEIGHTS = 2 * 2560 * 1280 * 9 * 2
"""Two of SD1.5's largest leaf, a convolution of 2560 to 1280 channels in half precision: the mover's least budget, less its buffers."""


def streaming(channels: int, share: float) -> None:
    """One step of a picture of one tile, and of nine and 25 tiles, with conditions batched."""
    unet = sd15(channels)
    total = weight_bytes(unet)
    streams = SimulatedStreams(capacity_bytes=4 * total, bandwidth=float("inf"), latency=0.0)
    config = OffloadConfig(budget_bytes=int(share * total), small_leaf_bytes=total * (1 << 20) // 1_719_041_928)
    mover = AsyncModelMover(config, streams)
    mover.attach({"unet": NetworkSpec([Region(block) for block in regions(unet)], unet, roots=[unet])})
    context, times = torch.randn(2, 77, 768), torch.tensor([3.0, 3.0])
    status = mover.status()

    def step(side: int, tiles: int, calls: int, repeat: int) -> list[int]:
        """Bytes streamed by each of `repeat` steps."""
        made = pieces(side, side, (8, 8), 0)
        assert len(made) == tiles
        at_once = -(-tiles // calls)
        tiled = TiledDenoiser(made, at_once)
        latent = torch.randn(2, 4, side, side)
        found = []

        def apply(x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            with in_chunks(unet, at_once if tiles > 1 else 1, hold=mover.holding):
                return unet(x, t, cond)

        for _ in range(repeat):
            before = mover.status()["streamed_bytes"]
            with torch.no_grad():
                tiled(apply, latent, times, context)
            found.append(mover.status()["streamed_bytes"] - before)
        return found

    step(8, 1, 1, 4)
    once = step(8, 1, 1, 1)[0]
    status = mover.status()
    print(f"weights {total / MB:.1f} MB, budget {share:.0%}: {status['resident_bytes'] / MB:.1f} MB resident, "
          f"ring {status['ring_bytes'] / MB:.1f} MB, {len(parts(unet, automatic_limit(unet)))} parts")
    print(f"  512x512, one tile, one call:          {once / MB:7.1f} MB per step")
    for side, tiles, calls in ((24, 9, 1), (40, 25, 1), (40, 25, 2)):
        found = step(side, tiles, calls, STEPS)
        first = " ".join(f"{each / once:.2f}" for each in found)
        print(f"  2048x2048, {tiles:2d} tiles, {calls} call(s) a step: {found[-1] / MB:7.1f} MB per step; last of {STEPS}; "
              f"each, in units of 512x512's: {first}")
    peak = mover.status()["peak_weight_bytes"]
    print(f"  most weights on the device in all of these, by its own counter: {peak / MB:.1f} MB of {status['budget_bytes'] / MB:.1f} MB")
    mover.close()
    streams.close()


def activations() -> None:
    """2048x2048 in exact SD1.5."""
    unet = empty_unet(sd15_shape(320), torch.float16)
    need = kept(unet, 2)

    def measured(side: int, samples: int, chunks: int) -> int:
        x = torch.empty(samples, 4, side, side, device="meta", dtype=torch.float16)
        given = (x, torch.empty(samples, device="meta"), torch.empty(samples, 77, 768, device="meta", dtype=torch.float16))

        def run() -> None:
            with in_chunks(unet, chunks):
                unet(*given)

        return peak_bytes(run, *given, *unet.parameters())

    print(f"exact SD1.5, 2048x2048, half precision; the least for weights: {LEAST_WEIGHTS / MB:.0f} MB; mark: {MARK / MB:.0f} MB")
    print(f"  untiled, one condition at a time:   {measured(256, 1, 1) / MB:6.0f} MB; 512x512, both: {measured(64, 2, 1) / MB:.0f} MB")
    for batch, name in ((1, "conditions apart"), (2, "both conditions  ")):
        room = MARK - LEAST_WEIGHTS
        size, overlap = choose(need, 256, 256, batch, room, None, lambda side: LargePictures().overlap_of(side * 8) // 8, sdxl=False,
                               smaller=False)
        made = pieces(256, 256, size, overlap)
        found = group(need, len(made), batch, *size, room)
        peak = measured(size[0], found.pieces * batch, found.chunks)
        steps = found.calls * (2 if batch == 1 else 1)
        print(f"  {name}: {len(made)} tiles of {size[0] * 8} px, overlap {overlap * 8}, {found.pieces} to a call in {found.chunks} chunks, "
              f"{steps} streams of weights a step: {peak / MB:.0f} MB measured, {found.needed_bytes / MB:.0f} MB said; "
              f"with weights {(peak + LEAST_WEIGHTS) / MB:.0f} MB")
    for free in (600, 1000, 1500, 3000, 6000):
        size, overlap = choose(need, 256, 256, 2, free * MB, None, lambda side: LargePictures().overlap_of(side * 8) // 8, sdxl=False,
                               smaller=False)
        made = pieces(256, 256, size, overlap)
        found = group(need, len(made), 2, *size, free * MB)
        print(f"  {free:5d} MB for activations, both conditions: {len(made)} tiles of {size[0] * 8} px, {found.calls} call(s) a step, "
              f"{found.chunks} chunks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=32, help="width of the UNet that is streamed; SD1.5 has 320")
    channels = parser.parse_args().channels
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began = time.monotonic()
    for share in (0.12, 0.5):
        streaming(channels, share)
    activations()
    print(f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
