"""Blended tiles against the definition in float64, and no steps where tiles meet."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lib_async_lowvram.large.blending import VARIANCE, Blend, gaussian_weights
from lib_async_lowvram.large.pieces import pieces
from lib_async_lowvram.large.regions import parse
from lib_async_lowvram.large.tiled_denoiser import TiledDenoiser


def reference(height: int, width: int) -> list[list[float]]:
    """The formula, cell by cell, in Python's floats."""

    def one(i: int, n: int) -> float:
        return math.exp(-(((i - (n - 1) / 2) / n) ** 2) / (2 * VARIANCE))

    return [[one(y, height) * one(x, width) for x in range(width)] for y in range(height)]


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (7, 12), (64, 64), (96, 128)])
def test_weights(shape: tuple[int, int]) -> None:
    weights = gaussian_weights(*shape)
    expected = torch.tensor(reference(*shape), dtype=torch.float64)
    assert weights.dtype == torch.float32 and (weights > 0).all()
    assert torch.equal(weights, expected.to(torch.float32))
    assert torch.equal(weights, weights.flip(0)) and torch.equal(weights, weights.flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(40, 33), (16, 50), (24, 24)])
def test_the_mean_is_the_reference_s(dtype: torch.dtype, size: tuple[int, int]) -> None:
    made = pieces(*size, (16, 16), 5)
    assert len(made) > 1
    values = [torch.randn(2, 4, piece.tile.height, piece.tile.width).to(dtype) for piece in made]
    blend = Blend((2, 4, *size), "cpu")
    sums, weights = torch.zeros(2, 4, *size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for piece, value in zip(made, values, strict=True):
        blend.add(piece.tile, value, piece.weights)
        exact = torch.tensor(reference(piece.tile.height, piece.tile.width), dtype=torch.float64)
        sums[..., piece.tile.rows, piece.tile.columns] += exact * value.double()
        weights[piece.tile.rows, piece.tile.columns] += exact
    error = (blend.mean(torch.float32).double() - sums / weights).abs().max()
    assert error < 2e-6, error
    assert blend.mean(dtype).dtype == dtype


def test_sums_are_not_the_model_s_precision() -> None:
    """In float16 the corners' weights (1e-11) would be 0, and the mean of a thousand tiles wrong."""
    made = pieces(24, 24, (16, 16), 8)
    blend = Blend((1, 1, 24, 24), "cpu")
    for piece in made:
        blend.add(piece.tile, torch.full((1, 1, 16, 16), 0.333, dtype=torch.float16), piece.weights)
    mean = blend.mean(torch.float16)
    assert torch.equal(mean, torch.full_like(mean, 0.333))


def test_a_cell_that_nobody_covers_shows() -> None:
    made = pieces(24, 24, (16, 16), 8)
    blend = Blend((1, 1, 24, 24), "cpu")
    for piece in made[:-1]:
        blend.add(piece.tile, torch.ones(1, 1, 16, 16), piece.weights)
    assert blend.mean(torch.float32)[..., -1, -1].isnan().all() and not blend.mean(torch.float32)[..., 0, 0].isnan().any()


def steps_across(picture: torch.Tensor, columns: set[int]) -> tuple[float, float]:
    """The largest step from a column to the next: across one of `columns`, and anywhere else."""
    steps = (picture[..., 1:] - picture[..., :-1]).abs().amax((0, 1, 2))
    across = [float(steps[column - 1]) for column in sorted(columns)]
    return max(across), max(float(step) for column, step in enumerate(steps, start=1) if column not in columns)


@pytest.mark.parametrize("regions", [[], [{"x": 0.2, "y": 0.1, "width": 0.5, "height": 0.6, "prompt": "a"}]], ids=["plain", "regions"])
def test_a_translation_equivariant_denoiser_gives_no_borders(regions: list) -> None:
    """It sees a neighbourhood of three cells: with zeros beyond a tile's border its outermost cells are wrong, and nothing of that may
    be seen inside the picture. Pointwise work is exact to the last bits."""
    latent = torch.randn(1, 4, 48, 64)
    latent = F.avg_pool2d(latent, 9, 1, 4)
    kernel = torch.randn(4, 4, 7, 7) / 14
    made = pieces(48, 64, (24, 24), 12, parse(regions)[0])

    def convolve(x, t, cond):
        return F.conv2d(x, kernel, padding=3)

    tiled = TiledDenoiser(made, 4)(convolve, latent, torch.ones(1), {}, lambda sources, cond: dict.fromkeys(sources, cond))
    whole = convolve(latent, None, None)
    borders = {piece.tile.x for piece in made if piece.tile.x} | {piece.tile.x + 24 for piece in made if piece.tile.x + 24 < 64}
    across, elsewhere = steps_across(tiled[..., 6:-6, :], borders)
    assert across <= elsewhere
    assert (tiled - whole)[..., 6:-6, 6:-6].abs().max() < 1e-2 * whole.abs().max()

    pointwise = TiledDenoiser(made, 4)(lambda x, t, cond: torch.tanh(3 * x), latent, torch.ones(1), {}, lambda s, c: dict.fromkeys(s, c))
    assert (pointwise - torch.tanh(3 * latent)).abs().max() < 5e-7
