"""Expressions over a picture, evaluated in bands of full-width rows.

Problem: between two convolutions of a VAE lie a norm, a nonlinearity, an upsampling: as whole pictures each would take as much memory
as what they are computed from. So they are not computed when the module asks for them but written down, and evaluated for just the
rows that a convolution, or whoever stores the result, wants at the moment. Bit for bit the same operations on the same values.

A band has the picture's whole width: its neighbours are two, the rows a convolution needs of them are fetched, not computed twice, and
nothing has to be blended, because nothing is approximated. The picture's own border is the only place that is padded.

Used by `banded`. On the thread that computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from lib_async_lowvram.large.norm_statistics import normalise
from lib_async_lowvram.large.space import Stored

Memo = dict[tuple[int, int, int], torch.Tensor]


class Untileable(RuntimeError):
    """A picture cannot be computed in bands: an operation, or a network, that nobody here knows."""


class Expression:
    """Of `shape` (picture, channel, row, column) and `dtype`; its rows are computed on `device`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def rows(self, top: int, bottom: int, memo: Memo) -> torch.Tensor:
        """Rows [top, bottom), not to be written to. `memo`: what this band's evaluation has computed so far, for what is used twice."""
        raise NotImplementedError

    @property
    def row_bytes(self) -> int:
        """Of one row of itself."""
        return self.shape[0] * self.shape[1] * self.shape[3] * self.dtype.itemsize

    @property
    def live_bytes(self) -> int:
        """The most that lives while rows are evaluated, per row, itself included. An upper bound: everything below counts, twice where
        it is used twice."""
        return self.row_bytes


class Kept(Expression):
    """What is stored."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.shape, self.dtype, self.device = stored.shape, stored.dtype, stored.device

    def rows(self, top: int, bottom: int, memo: Memo) -> torch.Tensor:
        key = (id(self.stored), top, bottom)
        if key not in memo:
            memo[key] = self.stored.rows(top, bottom)
        return memo[key]


class Pointwise(Expression):
    """`function` of expressions of one size, pixel by pixel. What else it reads it must own: a module's weights are elsewhere by the time
    that it is called."""

    def __init__(self, function: Callable[..., torch.Tensor], *of: Expression) -> None:
        if any(each.shape[2:] != of[0].shape[2:] for each in of):
            raise Untileable(f"pictures of {[each.shape for each in of]} in one operation")
        self._function, self._of = function, of
        # One pixel tells which shape and dtype come out, and whether it works at all.
        corner = function(*(torch.zeros((*each.shape[:2], 1, 1), dtype=each.dtype, device=each.device) for each in of))
        if corner.shape[2:] != (1, 1):
            raise Untileable("an operation that is not pixel by pixel")
        self.shape = (*corner.shape[:2], *of[0].shape[2:])
        self.dtype, self.device = corner.dtype, of[0].device

    def rows(self, top: int, bottom: int, memo: Memo) -> torch.Tensor:
        key = (id(self), top, bottom)
        if key not in memo:
            memo[key] = self._function(*(each.rows(top, bottom, memo) for each in self._of))
        return memo[key]

    @property
    def live_bytes(self) -> int:
        return self.row_bytes + sum(each.live_bytes for each in self._of)


class Normalised(Pointwise):
    """A norm whose statistics are known: times `scale`, plus `shift`, as `dtype`."""

    def __init__(self, of: Expression, scale: torch.Tensor, shift: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__(lambda x: normalise(x, scale, shift, dtype), of)
        self._wide = scale.dtype.itemsize

    @property
    def live_bytes(self) -> int:
        return super().live_bytes + self._wide * self.row_bytes // self.dtype.itemsize  # the same, before it is rounded


class Enlarged(Expression):
    """Each pixel `factor` times in both directions."""

    def __init__(self, of: Expression, factor: int) -> None:
        self._of, self._factor = of, factor
        count, channels, height, width = of.shape
        self.shape = (count, channels, height * factor, width * factor)
        self.dtype, self.device = of.dtype, of.device

    def rows(self, top: int, bottom: int, memo: Memo) -> torch.Tensor:
        first = top // self._factor
        small = self._of.rows(first, -(-bottom // self._factor), memo)
        large = functional.interpolate(small, scale_factor=float(self._factor), mode="nearest")
        return large[:, :, top - first * self._factor : bottom - first * self._factor]

    @property
    def live_bytes(self) -> int:
        return self.row_bytes + self._of.live_bytes  # a row of it needs a whole one of the smaller, where bands are short


class Padded(Expression):
    """With a border: `left`, `right`, `above`, `below` pixels of `value`, or of the other side where it is None (circular)."""

    def __init__(self, of: Expression, left: int, right: int, above: int, below: int, value: float | None = 0.0) -> None:
        if min(left, right, above, below) < 0:
            raise Untileable("a border that takes pixels away")
        if value is None and max(above, below) > of.shape[2]:
            raise Untileable("a circular border larger than the picture")
        self._of, self._sides, self._above, self._value = of, (left, right), above, value
        count, channels, height, width = of.shape
        self._height = height
        self.shape = (count, channels, height + above + below, width + left + right)
        self.dtype, self.device = of.dtype, of.device

    def rows(self, top: int, bottom: int, memo: Memo) -> torch.Tensor:
        top, bottom, height = top - self._above, bottom - self._above, self._height
        inside = (max(0, top), min(height, bottom))
        if self._value is None:
            spans = [(top + height, min(0, bottom) + height), inside, (max(height, top) - height, bottom - height)]
            pieces = [self._of.rows(*span, memo) for span in spans if span[0] < span[1]]
            x = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
            return functional.pad(x, (*self._sides, 0, 0), mode="circular") if any(self._sides) else x
        if inside[0] >= inside[1]:
            shape = (*self.shape[:2], bottom - top, self.shape[3])
            return torch.full(shape, self._value, dtype=self.dtype, device=self.device)
        x = self._of.rows(*inside, memo)
        border = (*self._sides, inside[0] - top, bottom - inside[1])
        return functional.pad(x, border, value=self._value) if any(border) else x

    @property
    def live_bytes(self) -> int:
        return self.row_bytes + self._of.live_bytes
