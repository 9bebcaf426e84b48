"""What a user asks for large pictures, read from whatever a form, an API or a saved picture holds. Pure.

Invariant: numbers that cannot be used become the nearest usable ones, with a line saying so; a mode nobody knows, or something that
is not a region, is an error that names it. Sizes are in pixels; 0 is automatic. A latent cell is 8 pixels, and what the networks halve
three times must stay whole: sizes are multiples of 64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lib_async_lowvram.large.regions import Region, parse

OFF, AUTOMATIC, ON = "Off", "Automatic", "On"
MODES = (OFF, AUTOMATIC, ON)
STEP = 64
LEAST_TILE, MOST_TILE = 256, 4096
DEFAULT_OVERLAP_SHARE = 0.25
"""Of a tile, where the overlap is left to us: a quarter on each side is half a tile shared with each neighbour's, as the paper's
examples (arXiv 2302.02412) have it."""


@dataclass(frozen=True)
class LargePictures:
    """mode: `OFF`, `AUTOMATIC` (tiles where the picture is larger than `tile`, or memory is short), `ON` (tiles wherever there can be
    two). tile, overlap: pixels; None is automatic. regions: with prompts of their own, in any mode but `OFF`."""

    mode: str = OFF
    tile: int | None = None
    overlap: int | None = None
    regions: tuple[Region, ...] = ()

    @property
    def off(self) -> bool:
        return self.mode == OFF

    def overlap_of(self, tile: int) -> int:
        """Pixels by which tiles of `tile` pixels overlap: what was asked, cut to half a tile, or the default; a multiple of 8."""
        wanted = DEFAULT_OVERLAP_SHARE * tile if self.overlap is None else min(self.overlap, tile // 2)
        return int(wanted) // 8 * 8


def read(mode: Any = OFF, tile: Any = 0, overlap: Any = 0, regions: Any = None) -> tuple[LargePictures, tuple[str, ...]]:
    """The settings, and one line for each value that was replaced. `mode` in any case, None and "" are off; `tile` and `overlap`: 0, None
    and "" are automatic; `regions` as `regions.parse`. ValueError for an unknown mode and for regions that are none."""
    chosen = next((each for each in MODES if each.lower() == str(mode or OFF).strip().lower()), None)
    if chosen is None:
        raise ValueError(f"large pictures: mode {mode!r} is none of {', '.join(MODES)}")
    if chosen == OFF:
        return LargePictures(), ()
    notes: list[str] = []
    tile_px = _pixels("tile", tile, LEAST_TILE, MOST_TILE, STEP, notes)
    overlap_px = _pixels("overlap", overlap, 8, (tile_px or MOST_TILE) // 2, 8, notes)
    found, more = parse(regions)
    return LargePictures(chosen, tile_px, overlap_px, found), (*notes, *more)


def _pixels(name: str, value: Any, least: int, most: int, step: int, notes: list[str]) -> int | None:
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        notes.append(f"large pictures: {name} {value!r} is not a number, taken as 0 (automatic)")
        return None
    if number == 0:
        return None
    kept = min(max(math.floor(number / step + 0.5) * step, least), most)
    if kept != number:
        notes.append(f"large pictures: {name} {number:g} became {kept} (from {least} to {most}, in steps of {step})")
    return kept
