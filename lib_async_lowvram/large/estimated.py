"""Steps whose activations do not fit even the host: strips one after the other, through all of these steps at once.

Problem: a norm's exact statistics need the whole picture's activations before it, and they do not fit. But strips of rows, each computed
through all of these steps alone, do, once the statistics are known: every strip gets the same ones, so there is no step in tone between
strips. Strips overlap by as many rows as the convolutions reach, and only what is right is used, so there is nothing to blend either.
Where the statistics come from:

    recomputed  norm by norm: all strips run as far as the first norm whose statistics are not known, and each adds its share. Exact, as in
                `norm_statistics`; n norms take n sweeps of growing length, about n / 2 times the time of these steps.
    reduced     one run over a reduced picture: every n-th of the rows and columns of what goes into the first of these steps, about
                `REDUCED_PIXELS` of them. Takes next to no time, and is off by some hundredths of a standard deviation: texture is not
                the same at another scale. Large areas may come out a few grey levels too dark or too bright, all strips alike.

While the result is computed each strip says what its own share of every norm's statistics was. Together they are the whole picture's, given
what was used before; their distance from what was used is the error that is reported, for either way.

The weights of these steps are used once per strip and sweep, so a mover streams what is not resident as often. They are the widest
activations' steps, and those have the smallest weights (SD's decoder: 2 MB at full resolution, 11 MB at half).

On the thread that computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lib_async_lowvram.large.banded import Banded
from lib_async_lowvram.large.norm_statistics import Moments, Statistics, normalise, opmath
from lib_async_lowvram.large.rows import Kept, Untileable
from lib_async_lowvram.large.space import OutOfHostMemory, Space, Stored
from lib_async_lowvram.large.vae_memory import whole_bytes
from lib_async_lowvram.large.vae_steps import Step

REDUCED_PIXELS = 256 * 256


class Norms(TorchFunctionMode):
    """Inside, group norms of plain tensors are counted, and handed to `apply` with their number: (number, x, groups, weight, bias, eps)."""

    def __init__(self, apply: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._apply, self._number = apply, 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not functional.group_norm:
            return func(*args, **(kwargs or {}))
        number, self._number = self._number, self._number + 1
        return self._apply(number, *_norm_arguments(*args, **(kwargs or {})))


def _norm_arguments(
    input: torch.Tensor, num_groups: int, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> tuple:
    return input, num_groups, weight, bias, eps


def _run(steps: Sequence[Step], x: torch.Tensor, apply: Callable[..., torch.Tensor]) -> torch.Tensor:
    with Norms(apply):
        for step in steps:
            x = step.run(x)
    return x


def _native(x: torch.Tensor, groups: int, *rest: Any) -> torch.Tensor:
    return functional.group_norm(x, groups, *rest)


def measured(steps: Sequence[Step], x: torch.Tensor) -> list[Statistics]:
    """Of each norm, in order, while the steps run on `x` as a whole."""
    found: list[Statistics] = []

    def apply(number: int, x: torch.Tensor, groups: int, *rest: Any) -> torch.Tensor:
        moments = Moments()
        moments.add(x)
        found.append(moments.groups(groups))
        return _native(x, groups, *rest)

    _run(steps, x, apply)
    return found


def reduced(x: Banded, steps: Sequence[Step], band_bytes: int) -> torch.Tensor:
    """Every n-th row and column of a picture, as one tensor: of `REDUCED_PIXELS` at most, and such that `steps` run on it whole within
    `band_bytes`. Both sides multiples of what the steps shrink by."""
    stored = x.store()
    height, width = stored.shape[2:]
    relative, unit = _relative(steps)
    every = max(1, math.isqrt(-(-height * width // REDUCED_PIXELS)))
    while whole_bytes(relative, -(-height // every), -(-width // every), stored.dtype.itemsize) > band_bytes and every < height // unit:
        every += 1
    rows = [stored.rows(top, top + 1)[:, :, :, ::every] for top in range(0, height, every)]
    small = torch.cat(rows, 2)
    return small[:, :, : max(unit, small.shape[2] // unit * unit), : max(unit, small.shape[3] // unit * unit)]


def _relative(steps: Sequence[Step]) -> tuple[list[Step], int]:
    """With scales that count from the first of these steps' input; and how many of its rows become one, at most."""
    start = steps[0].scale / steps[0].factor
    relative = [Step(each.name, each.run, each.channels, each.scale / start, each.factor, each.reach) for each in steps]
    return relative, max(1, *(math.ceil(1 / each.scale) for each in relative))


@dataclass(frozen=True)
class Strip:
    """Rows of the first step's input: [low, high) are computed on, of which [top, bottom) come out right."""

    low: int
    top: int
    bottom: int
    high: int


def strips(height: int, rows: int, margin: int) -> Iterator[Strip]:
    """Over `height` rows, `rows` each, with `margin` more above and below, cut at the picture's border."""
    for top in range(0, height, rows):
        bottom = min(height, top + rows)
        yield Strip(max(0, top - margin), top, bottom, min(height, bottom + margin))


def geometry(steps: Sequence[Step], height: int, width: int, element: int, band_bytes: int) -> tuple[int, int, int]:
    """(rows of a strip, margin, bytes that a strip takes): as many rows as `band_bytes` has room for, both multiples of what the steps
    shrink by, which must divide the `height`; one multiple at least. `height`, `width`: of the first step's input."""
    relative, unit = _relative(steps)
    if height % unit:
        raise Untileable(f"{height} rows, where {unit} become one")
    reach = sum(step.reach * step.factor / step.scale for step in relative)
    margin = -(-math.ceil(reach) // unit) * unit
    rows = unit
    while rows < height and whole_bytes(relative, rows + unit + 2 * margin, width, element) <= band_bytes:
        rows += unit
    return rows, margin, whole_bytes(relative, rows + 2 * margin, width, element)


class Sweep:
    """All strips once, with the statistics that are given, for the first norms; and what every norm's turned out to be. What comes after
    the first norm without given ones is not right."""

    def __init__(self, steps: Sequence[Step], source: Stored, given: Sequence[Statistics]) -> None:
        self._steps, self._source, self._given = steps, source, given
        self._shares: dict[int, tuple[int, Moments]] = {}  # norm -> (groups, moments)

    def run(self, rows: int, margin: int) -> Iterator[torch.Tensor]:
        """Of each strip, from the top, what comes out right."""
        for strip in strips(self._source.shape[2], rows, margin):
            # Contiguous: a strip is a tensor like any other to these modules.
            x = _run(self._steps, self._source.rows(strip.low, strip.high).contiguous(), self._apply_in(strip))
            yield _inside(strip, x)

    def _apply_in(self, strip: Strip) -> Callable[..., torch.Tensor]:
        def apply(
            number: int, x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
        ) -> torch.Tensor:
            if number <= len(self._given):
                self._shares.setdefault(number, (groups, Moments()))[1].add(_inside(strip, x))
            if number >= len(self._given):
                return _native(x, groups, weight, bias, eps)
            dtype = _native(x[:, :, :1, :2].contiguous(), groups, weight, bias, eps).dtype
            scale, shift = self._given[number].scale_and_shift(x.shape[1], weight, bias, eps, opmath(x.dtype))
            return normalise(x, scale, shift, dtype)

        return apply

    def found(self) -> list[Statistics]:
        """Of each norm that was given, and of the first that was not."""
        return [moments.groups(groups) for _, (groups, moments) in sorted(self._shares.items())]


def _inside(strip: Strip, x: torch.Tensor) -> torch.Tensor:
    """The rows of `x`, computed from a strip, that are right."""
    top, bottom = ((row - strip.low) * x.shape[2] // (strip.high - strip.low) for row in (strip.top, strip.bottom))
    return x[:, :, top:bottom]


def recomputed(steps: Sequence[Step], source: Stored, rows: int, margin: int) -> list[Statistics]:
    """Of each norm, exactly. See the module."""
    given: list[Statistics] = []
    for number in range(len(steps)):
        while True:
            sweep = Sweep(steps[: number + 1], source, given)
            for _ in sweep.run(rows, margin):
                pass
            found = sweep.found()
            if len(found) == len(given):
                break  # this step's norms are known
            given = found
    return given


def run_estimated(steps: Sequence[Step], x: Banded, space: Space, band_bytes: int, exact: bool) -> tuple[Banded, float]:
    """The steps' result, and the statistics' error, see the module. `exact`: recomputed, or reduced."""
    if any(step.attention is not None for step in steps):
        raise OutOfHostMemory("no room for what the attention looks at, which is the whole picture")
    source = x.store()
    height = source.shape[2]
    rows, margin, strip_bytes = geometry(steps, *source.shape[2:], source.dtype.itemsize, band_bytes)
    given = recomputed(steps, source, rows, margin) if exact else measured(steps, reduced(x, steps, band_bytes))
    sweep = Sweep(steps, source, given)
    stored: Stored | None = None
    written = 0
    for part in sweep.run(rows, margin):
        if stored is None:
            ratio = steps[-1].scale / (steps[0].scale / steps[0].factor)
            stored = space.store((*part.shape[:2], int(height * ratio), part.shape[3]), part.dtype)
        stored.write(written, part)
        written += part.shape[2]
    space.note_band(rows, -(-height // rows), strip_bytes)
    error = max((float(used.error(true)) for used, true in zip(given, sweep.found(), strict=True)), default=0.0)
    return Banded(Kept(stored), space), error
