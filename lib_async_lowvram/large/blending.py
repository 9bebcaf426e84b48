"""What tiles predict becomes one picture: a weighted mean over all that cover a cell, with Gaussian weights.

Problem: neighbouring tiles disagree where they meet, and each is least sure at its border, where it sees one side only. Mixture of
Diffusers (arXiv 2302.02412, section 3) therefore weights every tile's noise prediction by a Gaussian around the tile's middle and
divides by the sum of the weights, so that a tile fades out before it ends.

Invariants: sums are kept in float32 whatever the model computes in; weights are products of two vectors, each computed in float64
and rounded once; tiles that agree give what they agree on, to the last bits of float32 (a weighted mean of equal numbers).

Pure torch. Called by `tiled_denoiser` on the thread and stream that compute.
"""

from __future__ import annotations

import torch

from lib_async_lowvram.large.tiles import Tile

VARIANCE = 0.01
"""Of the Gaussian, in units of the tile's side squared, as in the authors' implementation (github.com/albarji/mixture-of-diffusers): a
standard deviation of a tenth of the side, 3.7e-6 of the middle's weight at the border."""


def gaussian(length: int) -> torch.Tensor:
    """[length], float64: exp(-((i - m) / length)^2 / (2 * VARIANCE)) for i = 0 .. length - 1 and m = (length - 1) / 2.

    The authors divide by sqrt(2 pi VARIANCE), which cancels in the mean, and take length / 2 for the rows' middle; here both axes are
    symmetric. ValueError below one cell."""
    if length < 1:
        raise ValueError(f"a tile of {length} cells has no weights")
    places = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) / length
    return torch.exp(-places.square() / (2 * VARIANCE))


def gaussian_weights(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[height, width], float32, positive: a tile's weights."""
    return torch.outer(gaussian(height), gaussian(width)).to(device=device, dtype=torch.float32)


class Blend:
    """The weighted mean of tiles over a picture [batch, channels, height, width], being summed up."""

    def __init__(self, shape: torch.Size | tuple[int, ...], device: torch.device | str) -> None:
        self._sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self._weights = torch.zeros(shape[-2:], dtype=torch.float32, device=device)

    def add(self, tile: Tile, values: torch.Tensor, weights: torch.Tensor) -> None:
        """`values`: [batch, channels, tile.height, tile.width], of any floating type. `weights`: [tile.height, tile.width], not
        negative; where they are 0 the values count for nothing, NaN excepted."""
        self._sum[..., tile.rows, tile.columns].addcmul_(values.to(torch.float32), weights)
        self._weights[tile.rows, tile.columns].add_(weights)

    def mean(self, dtype: torch.dtype) -> torch.Tensor:
        """The picture, in `dtype`. Cells without any weight are NaN: a plan that leaves some has a fault, which must show."""
        return (self._sum / self._weights).to(dtype)
