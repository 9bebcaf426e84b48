"""How far two pictures are apart, and whether tiles show. Pictures are (1, channels, rows, columns), values about -1 to 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lib_async_lowvram.large.tiles import grid


def psnr(picture: torch.Tensor, reference: torch.Tensor, peak: float = 2.0) -> float:
    """In decibel; `peak`: from the darkest to the brightest value. Infinite where they are equal."""
    error = (picture.double() - reference.double()).square().mean()
    return float("inf") if error == 0 else float(10 * torch.log10(peak**2 / error))


WINDOW = 4


def steps(picture: torch.Tensor) -> torch.Tensor:
    """At each row but the outermost: how far the mean tone of the `WINDOW` rows from it on is from that of as many rows before it; the
    largest channel's. Element i: between rows i + WINDOW - 1 and i + WINDOW."""
    tone = picture.double().mean(dim=(0, 3))  # channel, row
    windows = tone.unfold(1, WINDOW, 1).mean(2)
    return (windows[:, WINDOW:] - windows[:, :-WINDOW]).abs().amax(0)


def border_steps(picture: torch.Tensor, reference: torch.Tensor, borders: Sequence[int]) -> tuple[float, float]:
    """(largest across a border, largest inside tiles) of the steps that `picture` has and `reference` has not. `borders`: the first rows
    of tiles, but for the picture's own; what is nearer to one than a quarter of a tile counts as neither."""
    found = steps(picture.double() - reference.double())
    rows = torch.arange(found.shape[0]) + WINDOW
    distance = torch.stack([(rows - border).abs() for border in borders]).amin(0)
    return float(found[distance == 0].max()), float(found[distance > min(borders) // 4].max())


def naive_tiles(decoder: nn.Module, z: torch.Tensor, tile: tuple[int, int], overlap: int) -> tuple[torch.Tensor, list[int]]:
    """The simple way: overlapping tiles of the latents, each decoded by itself, blended by linear ramps. And where tiles begin (rows)."""
    total = weight = None
    for each in grid(*z.shape[2:], tile, overlap):
        part = decoder(z[:, :, each.rows, each.columns])
        scale = part.shape[2] // each.height
        if total is None:
            total = torch.zeros(1, part.shape[1], z.shape[2] * scale, z.shape[3] * scale)
            weight = torch.zeros_like(total)
        down, across = (_ramp(size * scale, overlap * scale) for size in (each.height, each.width))
        ramp = down[:, None] * across[None, :]
        where = (..., slice(each.y * scale, (each.y + each.height) * scale), slice(each.x * scale, (each.x + each.width) * scale))
        total[where] += part * ramp
        weight[where] += ramp
    borders = sorted({each.y * scale for each in grid(*z.shape[2:], tile, overlap)} - {0})
    return total / weight, borders


def _ramp(length: int, overlap: int) -> torch.Tensor:
    place = torch.arange(length) + 0.5
    return torch.minimum(place, length - place).clamp(max=max(overlap, 0.5)) / max(overlap, 0.5)
