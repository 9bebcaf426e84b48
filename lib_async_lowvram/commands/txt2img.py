"""`txt2img`: one picture from one checkpoint file, within a set amount of memory (`standalone`).

Problem: owners of small GPUs, and of little main memory, want a large picture from a checkpoint of gigabytes without a WebUI. Weights stay
in their file and are read ahead; pictures are made in tiles.

Called by `__main__`. Imports nothing heavy before it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_async_lowvram.commands.common import CommandError, at_least_one, check_writable, not_negative
from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.request import Request, amount, size

if TYPE_CHECKING:
    from lib_async_lowvram.standalone.making import Made

MIB = 1 << 20
NEEDS = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "PIL", "tqdm", "numpy")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `txt2img` to the command line."""
    parser = commands.add_parser(
        "txt2img",
        help="make a picture from a checkpoint file, within a set amount of memory",
        description="Make one picture from an SD1.5 or SDXL checkpoint (one safetensors file, never loaded as a whole), in tiles, within "
        "--memory. Needs no network and no WebUI: python -m pip install '.[standalone]' in the project's folder",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a .safetensors file with UNet, VAE and text encoder"
    )
    parser.add_argument("--prompt", required=True, help="what to make")
    parser.add_argument("--negative-prompt", default="", help="what not to make")
    parser.add_argument("--size", type=_of(size), default=(512, 512), metavar="WxH", help="pixels, multiples of 64 (default: 512x512)")
    parser.add_argument("--steps", type=at_least_one, default=20, help="of the sampler (default: 20)")
    parser.add_argument(
        "--memory",
        type=_of(amount),
        default=800 * MIB,
        metavar="AMOUNT",
        help="to keep within, as 800MB or 2GB: main memory beyond what the program takes itself, or the GPU's (default: 800MB)",
    )
    parser.add_argument("--out", type=Path, default=Path("picture.png"), metavar="FILE.png", help="where to write (default: picture.png)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--sampler", default="Euler", help="of diffusers' samplers, by name: Euler, DDIM, DPM++ 2M, ... (default: Euler)")
    parser.add_argument("--cfg", type=not_negative, default=7.5, help="guidance; 1 or less is none (default: 7.5)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to start from, of any size")
    parser.add_argument("--strength", type=not_negative, default=0.75, help="how much of --image is made anew, 0 to 1 (default: 0.75)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... or simulated (default: cpu)")
    parser.add_argument("--precision", default="auto", help="to compute in: float32, bfloat16, float16 (default: float32 on the CPU)")
    parser.add_argument("--tile", type=at_least_one, metavar="PIXELS", help="side of a tile, a multiple of 64 (default: as memory allows)")
    parser.add_argument("--spill", type=Path, metavar="FOLDER", help="for what waits on disk (default: that of --out)")
    parser.set_defaults(run=run, needs=lambda options: NEEDS, what="txt2img")


def _of(read):
    """`read` as `type=` of an argument, with its own message."""

    def convert(text: str):
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def run(options: argparse.Namespace) -> None:
    """Raises as in `commands.common`."""
    # Nothing is fetched, whatever a library would like to look up.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    request = read(options)
    check_writable(options.out)
    import torch
    from tqdm import tqdm

    from lib_async_lowvram.standalone.making import make
    from lib_async_lowvram.standalone.pictures import save

    # A terminal sees it move; a log gets a line now and then.
    bar = Bar(tqdm, mininterval=0.1 if sys.stderr.isatty() else 30.0)
    try:
        made = make(request, say=tqdm.write, moved=bar.moved)
        bar.close()
        save(made.picture, options.out, describe(request))
    except CannotMake as error:
        raise CommandError(str(error)) from error
    except torch.cuda.OutOfMemoryError as error:
        raise CommandError(f"the device has not enough memory for one tile: {str(error).splitlines()[0]}") from error
    finally:
        bar.close()
    print(f"{options.out}: {request.width} x {request.height}, {made.tiling}")
    print("\n".join(figures(made, request)))


class Bar:
    """A progress bar for each stage, with the time left. `make`: tqdm."""

    def __init__(self, make: Callable, **more: Any) -> None:
        self._make, self._more = make, more
        self._bar: Any = None
        self._stage = ""

    def moved(self, stage: str, share: float) -> None:
        """So much of a stage is done."""
        if stage != self._stage:
            self.close()
            layout = "{l_bar}{bar:20}| {elapsed}, {remaining} left"
            self._bar, self._stage = self._make(total=100.0, desc=stage, bar_format=layout, **self._more), stage
        self._bar.update(100 * share - self._bar.n)

    def close(self) -> None:
        """Idempotent."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""


def read(options: argparse.Namespace) -> Request:
    """Raises `CommandError` for values that make no sense together."""
    if options.tile is not None and options.tile % 64:
        raise CommandError(f"--tile {options.tile}: must be a multiple of 64")
    if options.strength > 1:
        raise CommandError(f"--strength {options.strength:g}: must be from 0 to 1")
    width, height = options.size
    return Request(
        checkpoint=options.checkpoint, prompt=options.prompt, negative_prompt=options.negative_prompt, width=width, height=height,
        steps=options.steps, memory_bytes=options.memory, seed=options.seed, sampler=options.sampler, cfg=options.cfg, image=options.image,
        strength=options.strength, device=options.device, precision=options.precision, tile=options.tile,
        # Not the folder of temporary files, which is main memory on many systems.
        spill=options.spill or options.out.resolve().parent,
    )  # fmt: skip


def describe(request: Request) -> str:
    """What the picture was made from, as other programs write it into PNG files."""
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return (
        f"{request.prompt}{negative}\nSteps: {request.steps}, Sampler: {request.sampler}, CFG scale: {request.cfg:g}, "
        f"Seed: {request.seed}, Size: {request.width}x{request.height}, Model: {request.checkpoint.stem}"
    )


def figures(made: Made, request: Request) -> list[str]:
    """What it took, a line each."""
    lines = ["time: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in made.seconds.items())]
    speed = made.read_bytes / made.read_seconds / 1e9 if made.read_seconds else 0.0
    lines.append(f"read from the checkpoint: {made.read_bytes / 1e9:.2f} GB at {speed:.2f} GB/s")
    if made.vae is not None:
        written, waiting = made.vae.spilled_bytes / 1e9, made.vae.host_bytes / 1e9
        spilled = f", {written:.2f} GB of what waited written out, {waiting:.2f} GB at once" if written else ""
        lines.append(f"VAE: {made.vae.mode}, {made.vae.bands} bands{spilled}")
    if made.device_bytes is not None:
        lines.append(f"device memory: {made.device_bytes / MIB:.0f} MB at most, of {request.memory_bytes / MIB:.0f} MB allowed")
    if made.imported_bytes is not None and made.peak_bytes is not None:
        each = ", ".join(f"{name} {(peak - made.imported_bytes) / MIB:.0f}" for name, peak in made.peaks.items() if peak is not None)
        more = (made.peak_bytes - made.imported_bytes) / MIB
        lines.append(
            f"main memory: {made.imported_bytes / MIB:.0f} MB after imports, {more:.0f} MB more at most (until the end of: {each})"
        )
    return lines
