"""Figures of the tiled VAE against the untiled one, for a results file: `python -m tests.large.vae_report --sizes 1024 2048 --json FILE`.

The VAE is `realistic_vae`'s at reduced width; device and host limits are such that they bind as they would at full width. Besides: what the
formulas of `vae_memory` say for SD's full width in float16 at the same sizes, under 600 MB for activations.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lib_async_lowvram.large.tiled_vae import Limits, run
from lib_async_lowvram.large.vae_memory import shares, stored_bytes, whole_bytes
from lib_async_lowvram.large.vae_steps import steps_of
from tests.large.measures import border_steps, naive_tiles, psnr
from tests.large.realistic_vae import Decoder, Encoder, calibrated, latents, pictures

MB = 1 << 20
BANDS = 64
FULL_WIDTH, ACTIVATIONS = 128, 600 * MB


def compared(name: str, got: torch.Tensor, expected: torch.Tensor, borders: list[int], seconds: float, **more: Any) -> dict[str, Any]:
    across, inside = border_steps(got, expected, borders)
    return {"what": name, "psnr_db": psnr(got, expected), "step_across": across, "step_inside": inside, "seconds": seconds, **more}


@torch.no_grad()
def figures(size: int, width: int) -> list[dict[str, Any]]:
    """Of one size of picture (pixels)."""
    vae, found = calibrated(width), []
    small = size * size * width * 4  # bytes of one activation at full resolution
    for method, network, x in (("decode", vae.decoder, latents(size // 8, size // 8)), ("encode", vae.encoder, pictures(size, size))):
        begin = time.perf_counter()
        expected = network(x)
        found.append({"what": f"{method}, untiled", "size": size, "seconds": time.perf_counter() - begin})
        ways = {
            "spilled": Limits(small, 1 << 40, BANDS),
            "on the device": Limits(64 * small, 0, BANDS),
            "estimated": Limits(3 * small, small // 4, BANDS, estimate=True),
        }
        for name, limits in ways.items():
            begin = time.perf_counter()
            got, report = run(network, x, limits)
            cut = BANDS if method == "decode" else BANDS // 8  # an eighth of the rows come out
            borders = list(range(cut, got.shape[2], cut))
            seconds = time.perf_counter() - begin
            found.append(compared(f"{method}, {name}", got, expected, borders, seconds, size=size, **asdict(report)))
        if method == "decode":
            begin = time.perf_counter()
            got, borders = naive_tiles(network, x, (size // 32, size // 8), 0)
            found.append(compared("decode, each tile's own statistics", got, expected, borders, time.perf_counter() - begin, size=size))
            got, borders = naive_tiles(network, x, (size // 32, size // 8), 8)
            found.append(compared("the same, blended over 8 cells", got, expected, borders, time.perf_counter() - begin, size=size))
    return found


def full_width(size: int) -> dict[str, Any]:
    """What SD's VAE takes by the formulas, in float16."""
    found: dict[str, Any] = {"size": size}
    with torch.device("meta"):
        networks = {"decode": (Decoder(FULL_WIDTH), size // 8), "encode": (Encoder(FULL_WIDTH), size)}
    for method, (network, side) in networks.items():
        steps = steps_of(network)
        found[method] = {
            "untiled_mb_without_attention": whole_bytes(steps, side, side, 2, attention=False) >> 20,
            "stored_mb": max(stored_bytes(step, side, side, 2) for step in steps) >> 20,
            "of_which_on_the_device_mb": shares(ACTIVATIONS)[0] >> 20,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--width", type=int, default=4, help="channels of the first level; SD has 128")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = []
    for size in arguments.sizes:
        for row in figures(size, arguments.width):
            measured.append(row)
            shown = {key: round(value, 8) if isinstance(value, float) else value for key, value in row.items()}
            print(json.dumps(shown), flush=True)
    formulas = [full_width(size) for size in arguments.sizes]
    print(json.dumps(formulas))
    if arguments.json:
        result = {"schema": "async-lowvram-tiled-vae/1", "torch": torch.__version__, "width": arguments.width}
        arguments.json.write_text(json.dumps({**result, "measured": measured, "full_width_float16": formulas}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
