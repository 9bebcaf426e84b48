"""Group-norm statistics of a whole picture, put together from its parts.

Problem: a group norm takes mean and variance over the whole picture. Taken over a tile instead, they shift the tile's tone against its
neighbour's: the known fault of simple tiling. So every part gives its own share, and the norm is applied with the sum.

Exactness: a part's mean and variance are taken in float32 by torch's own (Welford) kernel, and shares are combined in float64 by the
formula of Chan, Golub and LeVeque ("Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979):

    n = n1 + n2,  mean = mean1 + (mean2 - mean1) n2 / n,  M2 = M2_1 + M2_2 + (mean2 - mean1)^2 n1 n2 / n

which, unlike sums of squares, loses nothing where the mean is far from 0. Channels are kept apart, so that groups of any size can be
formed later. The norm is applied as torch does: as scale and shift per channel, in float32 (float64 for float64), rounded once.

Pure; any thread. Figures stay tensors on the device until somebody asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which has no float64


def opmath(dtype: torch.dtype) -> torch.dtype:
    """What torch computes a norm of `dtype` in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Statistics:
    """Of each group of each picture: `mean` and (biased) `variance`, both (pictures, groups), float64."""

    mean: torch.Tensor
    variance: torch.Tensor

    def error(self, true: Statistics) -> torch.Tensor:
        """How far these are from the `true` ones: the largest, over all groups, of the mean's distance in true standard deviations and
        of the standard deviation's relative distance. A tensor with one element, on the device."""
        deviation = true.variance.clamp_min(1e-12).sqrt()
        of_mean = ((self.mean - true.mean) / deviation).abs().max()
        of_deviation = (self.variance.clamp_min(0).sqrt() / deviation - 1).abs().max()
        return torch.maximum(of_mean, of_deviation)

    def scale_and_shift(
        self, channels: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the norm multiplies each channel with and adds to it: (pictures, channels, 1, 1) of `dtype`. New tensors: nothing of the
        module's is held beyond the call."""
        each = channels // self.mean.shape[1]
        scale = (self.variance.clamp_min(0) + eps).rsqrt().repeat_interleave(each, 1)
        if weight is not None:
            scale = scale * weight.to(scale.dtype)
        shift = -self.mean.repeat_interleave(each, 1) * scale
        if bias is not None:
            shift = shift + bias.to(scale.dtype)
        return scale.to(dtype)[:, :, None, None], shift.to(dtype)[:, :, None, None]


def normalise(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` * scale + shift, computed as wide as `scale` is, given as `dtype`."""
    return x.to(scale.dtype, copy=True).mul_(scale).add_(shift).to(dtype)


@dataclass
class Moments:
    """Of each channel of each picture, over all parts added so far."""

    shares: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(pixels, mean, M2) of each part; both (pictures, channels)."""

    def add(self, part: torch.Tensor) -> None:
        """Another part (picture, channel, row, column), disjoint from those before. An empty one counts for nothing."""
        count = part.shape[2] * part.shape[3]
        if count:
            variance, mean = torch.var_mean(part.to(opmath(part.dtype)), dim=(2, 3), correction=0)
            wide = _wide(part.device)
            self.shares.append((count, mean.to(wide), variance.to(wide) * count))

    def groups(self, number: int) -> Statistics:
        """Of `number` groups of channels that lie side by side. ValueError when nothing was added."""
        if not self.shares:
            raise ValueError("no part of the picture has been seen")
        counts = torch.tensor([count for count, _, _ in self.shares], dtype=torch.float64)
        pictures, channels = self.shares[0][1].shape
        means = torch.stack([mean for _, mean, _ in self.shares]).reshape(len(self.shares), pictures, number, channels // number)
        squares = torch.stack([square for _, _, square in self.shares]).reshape(means.shape)
        # Several shares at once: the same formula, with the common mean in the place of the first one's.
        weights = counts.to(means.device, means.dtype).reshape(-1, 1, 1, 1)
        total = weights.sum() * means.shape[3]
        mean = (means * weights).sum((0, 3)) / total
        square = (squares + weights * (means - mean[None, :, :, None]) ** 2).sum((0, 3))
        return Statistics(mean, square / total)
