"""Regions of a picture with prompts of their own: what they are, how they are read, and how they share the picture.

Problem: a region is told in shares of the picture, so that it means the same at every size; what comes from an API or a saved
picture may hold anything. And regions overlap, and end somewhere: who counts how much at a cell must add up, and change smoothly.

How cells are shared: a region's *presence* is 1 inside, and falls to nearly 0 towards its borders over `FEATHER` of its sides (a
raised cosine), except where it ends with the picture. Its share is weight * presence. The picture's own prompt, the background, has
1 - max over regions of min(weight, 1) * presence. Then all are divided by their sum. So a region of weight 1 replaces the background
inside, one of weight 0.5 is mixed half and half with it, and weights above 1 count among regions that overlap.

Pure; cells are latent cells. `parse` is called with the user's settings, `shares` once per size, on any thread.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

FEATHER = 0.125
"""Share of a region's side over which it fades at each border."""

MOST, MOST_WEIGHT, LEAST_SIDE = 16, 10.0, 0.01

_FIELDS = ("x", "y", "width", "height", "prompt", "negative", "weight")


@dataclass(frozen=True)
class Region:
    """x, y, width, height: shares of the picture's width and height, 0 to 1, from its upper left corner. negative: None is the
    picture's own. weight: above 0, at most `MOST_WEIGHT`."""

    x: float
    y: float
    width: float
    height: float
    prompt: str
    negative: str | None = None
    weight: float = 1.0

    def cells(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(first row, end row, first column, end column) in a picture of so many cells; at least one cell."""
        return *_span(self.y, self.height, height), *_span(self.x, self.width, width)

    def as_json(self) -> dict[str, Any]:
        """What `parse` reads back to the same region."""
        return asdict(self)


def _span(start: float, length: float, cells: int) -> tuple[int, int]:
    first = min(int(math.floor(start * cells + 0.5)), cells - 1)
    return first, max(first + 1, min(cells, int(math.floor((start + length) * cells + 0.5))))


# -- reading -----------------------------------------------------------------------------------------------------------------
def parse(given: Any) -> tuple[tuple[Region, ...], tuple[str, ...]]:
    """Regions from a list of mappings (or its JSON text; None and "" are none), and one line for every number that had to be brought
    into its range. ValueError, naming the region and the field, for anything that is not a region."""
    if isinstance(given, str):
        if not given.strip():
            return (), ()
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"regions are not JSON: {error}") from None
    if given is None:
        return (), ()
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise ValueError(f"regions are a list, not {type(given).__name__}")
    if len(given) > MOST:
        raise ValueError(f"{len(given)} regions are more than {MOST}")
    notes: list[str] = []
    return tuple(_region(number, each, notes) for number, each in enumerate(given, start=1)), tuple(notes)


def _region(number: int, given: Any, notes: list[str]) -> Region:
    name = f"region {number}"
    if isinstance(given, Region):
        given = given.as_json()
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is a mapping of {', '.join(_FIELDS)}, not {type(given).__name__}")
    unknown = [str(key) for key in given if key not in _FIELDS]
    if unknown:
        raise ValueError(f"{name} has no field {unknown[0]!r}; its fields are {', '.join(_FIELDS)}")
    prompt, negative = given.get("prompt"), given.get("negative")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{name}: prompt is a text that is not empty")
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f"{name}: negative is a text or null")
    x = _number(name, given, "x", None, 0.0, 1.0 - LEAST_SIDE, notes)
    y = _number(name, given, "y", None, 0.0, 1.0 - LEAST_SIDE, notes)
    width = _number(name, given, "width", None, LEAST_SIDE, 1.0 - x, notes)
    height = _number(name, given, "height", None, LEAST_SIDE, 1.0 - y, notes)
    weight = _number(name, given, "weight", 1.0, 0.01, MOST_WEIGHT, notes)
    return Region(x, y, width, height, prompt, negative, weight)


def _number(name: str, given: Mapping, field: str, default: float | None, least: float, most: float, notes: list[str]) -> float:
    value = given.get(field, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: {field} is a number from {least:g} to {most:g}, not {value!r}")
    kept = min(max(float(value), least), most)
    if abs(kept - value) > 1e-9:
        notes.append(f"{name}: {field} {value:g} became {kept:g}")
    return kept


# -- sharing -----------------------------------------------------------------------------------------------------------------
def _presence(first: int, end: int, cells: int) -> torch.Tensor:
    """[cells], float64: along one axis, 1 inside, a raised cosine within `FEATHER` of a border, 0 outside."""
    along = torch.zeros(cells, dtype=torch.float64)
    inside = torch.ones(end - first, dtype=torch.float64)
    ramp = max(1, round(FEATHER * (end - first)))
    rising = 0.5 - 0.5 * torch.cos((torch.arange(ramp, dtype=torch.float64) + 0.5) * math.pi / ramp)
    if first > 0:
        inside[:ramp] = torch.minimum(inside[:ramp], rising)
    if end < cells:
        inside[-ramp:] = torch.minimum(inside[-ramp:], rising.flip(0))
    along[first:end] = inside
    return along


def shares(regions: Sequence[Region], height: int, width: int) -> torch.Tensor:
    """[1 + len(regions), height, width], float32, at each cell summing up to 1 (to rounding): how much the background (first) and each
    region count there."""
    found = torch.zeros(1 + len(regions), height, width, dtype=torch.float64)
    taken = torch.zeros(height, width, dtype=torch.float64)
    for number, region in enumerate(regions, start=1):
        top, bottom, left, right = region.cells(height, width)
        presence = torch.outer(_presence(top, bottom, height), _presence(left, right, width))
        found[number] = region.weight * presence
        taken = torch.maximum(taken, min(region.weight, 1.0) * presence)
    found[0] = 1.0 - taken
    return (found / found.sum(0)).to(torch.float32)
