"""The attention in the middle of a VAE, over the whole picture, some queries at a time.

Problem: every position looks at every other one. At 2048x2048 these are 65536: as one matrix, 8 GB in float16. Queries do not know of each
other, so any number of them may be taken at a time, and nothing is approximated. Keys and values must be there whole (64 MB each at this
size, float16): that is the limit of what can be computed; input, queries and result lie where they have room (`space`).

Whose formula: softmax(q k^T / sqrt(channels)) v by torch's `scaled_dot_product_attention`, which takes a fused kernel where the device has
one for so many channels, and otherwise makes the matrix, for which the number of queries leaves room. The module's norm and four
projections are called as they are (diffusers' linear ones as convolutions, see `diffusers_vae`); its own `forward`, of which the WebUI has
six, is not. So where the picture is small enough for any of those the module itself is called (`tiled_vae`).

On the thread that computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lib_async_lowvram.large.banded import Banded
from lib_async_lowvram.large.diffusers_vae import attention_parts
from lib_async_lowvram.large.rows import Kept, Untileable
from lib_async_lowvram.large.space import Space

PARTS = ("norm", "q", "k", "v", "proj_out")


def attend(attention: nn.Module, x: Banded, space: Space) -> Banded:
    """`attention` of `x`, its input added. `Untileable` for an attention of another make."""
    part = _parts(attention)
    normed = part["norm"](x)
    queries = part["q"](normed).store()
    keys, values = (_tokens(part[name](normed).whole()) for name in ("k", "v"))
    del normed
    result = space.store(queries.shape, queries.dtype)
    count, channels, height, width = queries.shape
    # A query's row of the matrix: once as computed, and in float32 for the softmax.
    at_once = max(1, int(space.band_bytes / (count * keys.shape[2] * (queries.dtype.itemsize + 4))))
    rows = space.rows(0, 3 * count * channels * width * queries.dtype.itemsize, height)
    rows = max(1, min(rows, at_once // width))
    for top in range(0, height, rows):
        band = queries.rows(top, min(height, top + rows))
        tokens = _tokens(band)
        pieces = [functional.scaled_dot_product_attention(piece, keys, values) for piece in tokens.split(at_once, dim=2)]
        found = torch.cat(pieces, 2) if len(pieces) > 1 else pieces[0]
        result.write(top, found.transpose(2, 3).reshape(band.shape))
    del keys, values, queries
    return x + part["proj_out"](Banded(Kept(result), space))


def _parts(attention: nn.Module) -> dict[str, Callable[[Any], Any]]:
    found = attention_parts(attention)
    if found is not None:
        return found
    for name in PARTS:
        if not isinstance(getattr(attention, name, None), nn.GroupNorm if name == "norm" else nn.Conv2d):
            raise Untileable(f"an attention of type {type(attention).__name__}")
    return {name: getattr(attention, name) for name in PARTS}


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """(picture, 1, position, channel), contiguous."""
    count, channels, height, width = x.shape
    return x.reshape(count, channels, height * width).transpose(1, 2).contiguous().unsqueeze(1)
