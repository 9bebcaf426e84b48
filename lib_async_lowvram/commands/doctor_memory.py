"""`doctor --memory`: where memory goes - what a running WebUI has measured, and what large pictures would take on this device.

Problem: "out of memory" does not say whose. The status of a running WebUI knows the most that the text encoder, the UNet, the VAE and
the previews took, weights apart from activations; this asks for it and prints a table. Without one it still says what UNets of known
shape need for a picture, whole and in tiles, from `large.memory`'s formulas.

Called by `doctor`. Asks one address, the user's own, and only if told to by the option.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from lib_async_lowvram.commands.common import CommandError

ROUTE = "/async-lowvram/status"
DEFAULT_URL = "http://127.0.0.1:7860"
PATIENCE_SECONDS = 10.0
MOST_BYTES = 4 << 20
MIB = 1 << 20

SIDES = (512, 1024, 2048)
VALUE_BYTES = 2
SAMPLES = 2
"""One picture with both of its conditions, in half precision."""

COLUMNS = {
    "device_weights": "weights, GPU",
    "device_activations": "activations, GPU",
    "host_weights": "weights, RAM",
    "host_pinned": "pinned",
}


def ask(url: str) -> dict[str, Any]:
    """The status of the WebUI at `url`. Raises `CommandError` with one line where there is none."""
    if not url.lower().startswith(("http://", "https://")):
        raise CommandError(f"--url {url}: not an http address")
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the WebUI is the user's own
    try:
        with directly.open(url.rstrip("/") + ROUTE, timeout=PATIENCE_SECONDS) as answer:
            text = answer.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        why = {404: "runs without this extension", 401: "wants a password, which this command cannot give"}
        raise CommandError(f"the WebUI at {url} {why.get(error.code, f'answered {error.code}')}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # nobody listens, no such name, too slow; an address that is none
        reason = getattr(error, "reason", None) or error
        raise CommandError(f"no WebUI answers at {url} ({reason}): start it, or say where it is with --url") from error
    try:
        status = json.loads(text)
        if not isinstance(status["memory"], dict):
            raise TypeError
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"what answers at {url} is not this extension, or an older one: no memory report in its status") from error
    return status


def table(memory: Mapping[str, Any]) -> list[str]:
    """A line per region of a status's "memory". Figures are the most so far, those of host memory of now."""
    rows = [["", *COLUMNS.values()]]
    rows += [[name, *(_mb(found.get(key)) for key in COLUMNS)] for name, found in memory.items() if name != "process"]
    lines = _aligned(rows)
    peak = (memory.get("process") or {}).get("host_peak")
    return [*lines, f"the WebUI's process: at most {_mb(peak)} of main memory" if peak else "the WebUI's process: not known here"]


def pictures(free_bytes: int) -> list[dict[str, Any]]:
    """What UNets of known shape need for activations, bytes: whole, and in the tiles chosen where `free_bytes` are free for them."""
    import torch

    from lib_async_lowvram.bench.shapes import SHAPES
    from lib_async_lowvram.bench.unet import empty_unet
    from lib_async_lowvram.large.memory import group, kept
    from lib_async_lowvram.large.pieces import pieces
    from lib_async_lowvram.large.settings import LargePictures
    from lib_async_lowvram.large.tile_choice import CELL, choose

    found = []
    for name, shape in SHAPES.items():
        need = kept(empty_unet(shape(), torch.float16), VALUE_BYTES)
        for side in SIDES:
            cells = side // CELL
            tile, overlap = choose(
                need, cells, cells, SAMPLES, free_bytes, None, lambda each: LargePictures().overlap_of(each * CELL) // CELL,
                sdxl=name == "sdxl", smaller=False,
            )  # fmt: skip
            tiles = len(pieces(cells, cells, tile, overlap))
            grouped = group(need, tiles, SAMPLES, *tile, free_bytes)
            found.append(
                {
                    "unet": name,
                    "side": side,
                    "whole_bytes": group(need, 1, SAMPLES, cells, cells, 1 << 62).needed_bytes,
                    "tiles": tiles,
                    "tile_side": tile[0] * CELL,
                    "calls_per_step": grouped.calls,
                    "chunks": grouped.chunks,
                    "tiled_bytes": grouped.needed_bytes,
                }
            )
    return found


def picture_lines(found: list[dict[str, Any]], free_bytes: int) -> list[str]:
    """For people."""
    rows = [["UNet", "picture", "whole", "large pictures", "needs", "streams of weights per step"]]
    rows += [
        [
            {"sd15": "SD1.5", "sdxl": "SDXL"}[each["unet"]],
            f"{each['side']}x{each['side']}",
            _mb(each["whole_bytes"]),
            "whole" if each["tiles"] == 1 else f"{each['tiles']} tiles of {each['tile_side']}",
            _mb(each["tiled_bytes"]) + (" (more than is free)" if each["tiled_bytes"] > free_bytes else ""),
            str(each["calls_per_step"]),
        ]
        for each in found
    ]
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _mb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / MIB:.0f} MB"
