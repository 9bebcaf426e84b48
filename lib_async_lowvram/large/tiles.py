"""How a picture is covered by overlapping tiles: geometry, in whole cells (latent cells, or pixels). Pure.

Every cell lies in at least one tile; all tiles are equally large, so that they can be computed as one batch and with one set of
algorithms; neighbours overlap by at least what was asked, and by as equal amounts as whole cells allow.

Used by the tiled VAE and by tiled denoising.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The cells [y, y + height) x [x, x + width)."""

    y: int
    x: int
    height: int
    width: int

    @property
    def rows(self) -> slice:
        return slice(self.y, self.y + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.x, self.x + self.width)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles of `tile` cells begin on a side of `length` cells: from 0 to `length - tile`, as few as overlap by `overlap` cells or
    more, spread evenly. One, at 0, where a single tile holds the whole side.

    ValueError for sizes below 1, or an overlap that is negative or not smaller than the tile."""
    if length < 1 or tile < 1:
        raise ValueError(f"a side of {length} cells cannot be covered by tiles of {tile}")
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} cells does not fit tiles of {tile}")
    if length <= tile:
        return [0]
    room, step = length - tile, tile - overlap
    count = -(-room // step)  # gaps between neighbours
    return [number * room // count for number in range(count + 1)]


def grid(height: int, width: int, tile: tuple[int, int], overlap: int) -> list[Tile]:
    """Tiles over `height` x `width` cells, row by row. `tile`: height and width of one, cut to the picture's. The overlap gives way
    where a side of a tile is not larger than it. ValueError as `starts`."""
    down, across = min(tile[0], height), min(tile[1], width)
    rows = starts(height, down, min(overlap, max(0, down - 1)))
    columns = starts(width, across, min(overlap, max(0, across - 1)))
    return [Tile(y, x, down, across) for y in rows for x in columns]
