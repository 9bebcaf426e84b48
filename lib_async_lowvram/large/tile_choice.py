"""How large the tiles of a picture are, where the user leaves it open: what the model was trained for, and what fits.

Problem: small tiles see too little of the picture, large ones take memory, and an unlucky size covers a picture with twice as many
tiles as another. All sizes from two thirds of what the model was trained for to a little above it are about equally good, so among them
the one counts that needs the fewest calls of the UNet (each streams the weights once), then the fewest cells to compute, then the
largest.

Pure; cells are latent cells. Called by the host's side once per size of picture.
"""

from __future__ import annotations

from collections.abc import Callable

from lib_async_lowvram.large.memory import Kept, group
from lib_async_lowvram.large.tiles import grid

CELL = 8
"""Pixels to a cell, in each direction."""

SD, SDXL = (64, 72, 80, 88, 96, 104), (96, 104, 112, 120, 128, 136)
"""Sides of tiles. SD1 was trained at 64 cells, SD2 at 64 or 96, SDXL at 128; multiples of 8, since three halvings must stay whole."""

SHORT = (64, 48, 32)
"""Sides where memory is too short for any of these."""


def choose(
    kept: Kept | None, height: int, width: int, batch: int, free_bytes: int, asked: int | None, overlap_of: Callable[[int], int],
    *, sdxl: bool, smaller: bool,
) -> tuple[tuple[int, int], int]:  # fmt: skip
    """(height and width of a tile, least overlap) for a picture of `height` x `width` cells.

    `asked`: the side that the user wants, or None. `kept`: None where nothing is known of what fits. `overlap_of`: a tile's side to its
    overlap. `smaller`: tiles are wanted wherever there can be two; else a picture no larger than the tiles allowed, which fits, is left
    whole."""
    whole = ((height, width), 0)

    def fits(side: tuple[int, int]) -> bool:
        return kept is None or group(kept, 1, batch, *side, free_bytes).needed_bytes <= free_bytes

    longer = max(height, width)
    if asked is not None:
        return whole if longer <= asked else ((asked, asked), overlap_of(asked))
    sides = [side for side in (SDXL if sdxl else SD) if side < longer]
    usual = (SDXL if sdxl else SD)[-1]
    if longer <= usual and fits((height, width)) and not (smaller and sides):
        return whole
    able = [side for side in sides if fits((side, side))]
    if not able:
        short = [side for side in SHORT if side < longer]
        if not short:
            return whole
        able = [next((side for side in short if fits((side, side))), short[-1])]

    def cost(side: int) -> tuple[int, int, int]:
        tiles = grid(height, width, (side, side), overlap_of(side))
        cells = len(tiles) * tiles[0].height * tiles[0].width
        calls = group(kept, len(tiles), batch, tiles[0].height, tiles[0].width, free_bytes).calls if kept is not None else 1
        return calls, cells, -side

    best = min(able, key=cost)
    return (best, best), overlap_of(best)
