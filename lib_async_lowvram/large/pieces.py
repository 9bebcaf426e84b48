"""What one step of a tiled picture consists of: pieces, each one tile under one prompt, with the weights it counts with.

Problem: a region's prompt is wanted in the tiles that it touches and nowhere else, and the background's not where regions leave it
nothing; and all pieces should go through the model as one batch. So all tiles are of one grid and equally large, and a tile is a
piece once for the background and once for each region that has a share in it.

A piece's weights are the tile's Gaussian (`blending`) times its prompt's share of each cell (`regions.shares`). At every cell the
weights of some piece are positive, whatever the regions, since shares sum up to 1.

Pure; cells are latent cells. Made once per size of picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lib_async_lowvram.large.blending import gaussian_weights
from lib_async_lowvram.large.regions import Region, shares
from lib_async_lowvram.large.tiles import Tile, grid

BACKGROUND = 0
"""The source of pieces that the picture's own prompt makes; a region's is its number, from 1."""


@dataclass(frozen=True, eq=False)
class Piece:
    """tile: where. source: `BACKGROUND`, or the number of a region. weights: [tile.height, tile.width], float32, on the host."""

    tile: Tile
    source: int
    weights: torch.Tensor


def pieces(height: int, width: int, tile: tuple[int, int], overlap: int, regions: Sequence[Region] = ()) -> list[Piece]:
    """For a picture of `height` x `width` cells; `tile` and `overlap` as `tiles.grid` takes them, whose errors these are. Tile by
    tile; within one, the background first."""
    tiles = grid(height, width, tile, overlap)
    gaussian = gaussian_weights(tiles[0].height, tiles[0].width)
    if not regions:
        return [Piece(each, BACKGROUND, gaussian) for each in tiles]
    shared = shares(regions, height, width)
    made = []
    for each in tiles:
        for source in range(1 + len(regions)):
            share = shared[source, each.rows, each.columns]
            if share.max() > 0:
                made.append(Piece(each, source, gaussian * share))
    return made


def is_untiled(made: Sequence[Piece]) -> bool:
    """Whether this is the picture as a whole, under its own prompt."""
    return len({piece.tile for piece in made}) == 1 and all(piece.source == BACKGROUND for piece in made)
