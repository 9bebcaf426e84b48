"""Tiles cover everything, overlap as asked, and are no more than needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.large.tiles import Tile, grid, starts


@given(st.integers(1, 400), st.integers(1, 120), st.data())
def test_a_side_is_covered(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    found = starts(length, tile, overlap)
    assert found[0] == 0 and found == sorted(set(found))
    if length <= tile:
        assert found == [0]
        return
    assert found[-1] == length - tile
    gaps = [after - before for before, after in zip(found, found[1:], strict=False)]
    assert all(gap <= tile - overlap for gap in gaps)
    assert max(gaps) - min(gaps) <= 1
    assert (len(gaps) - 1) * (tile - overlap) < length - tile  # one fewer would not do


@pytest.mark.parametrize(("length", "tile", "overlap"), [(0, 8, 0), (8, 0, 0), (8, 4, 4), (8, 4, -1)])
def test_nonsense_is_an_error(length: int, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="tiles of"):
        starts(length, tile, overlap)


def test_a_grid_row_by_row() -> None:
    assert grid(10, 16, (8, 8), 2) == [Tile(y, x, 8, 8) for y in (0, 2) for x in (0, 4, 8)]
    tile = grid(5, 16, (8, 8), 7)[0]
    assert (tile.height, tile.width, tile.rows, tile.columns) == (5, 8, slice(0, 5), slice(0, 8))
    assert grid(4, 4, (8, 8), 7) == [Tile(0, 0, 4, 4)]
    assert len(grid(1, 20, (8, 8), 4)) == 4
