"""Tiles as large as the model likes, and as memory allows."""

from __future__ import annotations

import pytest

from lib_async_lowvram.large.memory import Kept, group
from lib_async_lowvram.large.settings import LargePictures
from lib_async_lowvram.large.tile_choice import choose
from lib_async_lowvram.large.tiles import grid

SD15 = Kept(2560.0, 7040.0, 8, 2)
MB = 1 << 20


def chosen(height, width, free_mb, asked=None, *, kept=SD15, batch=1, sdxl=False, smaller=False, overlap=None):
    settings = LargePictures(overlap=overlap)

    def overlap_of(side):
        return settings.overlap_of(side * 8) // 8

    return choose(kept, height, width, batch, free_mb * MB, asked, overlap_of, sdxl=sdxl, smaller=smaller)


def test_2048_with_800_mb_is_one_call_for_each_condition() -> None:
    size, overlap = chosen(256, 256, 800 - 118)
    assert (size, overlap) == ((104, 104), 26)
    assert len(grid(256, 256, size, overlap)) == 9
    assert group(SD15, 9, 1, *size, (800 - 118) * MB).calls == 1


@pytest.mark.parametrize(
    ("height", "width", "free", "smaller", "expected"),
    [
        (64, 64, 4000, False, (64, 64)),  # as trained
        (96, 64, 4000, False, (96, 64)),
        (104, 104, 4000, False, (104, 104)),
        (104, 104, 4000, True, (64, 64)),  # wherever there can be two: fewest cells
        (64, 64, 4000, True, (64, 64)),
        (104, 104, 150, False, (64, 64)),  # short of memory: four of them fit one call
        (64, 64, 40, False, (32, 32)),
        (64, 64, 1, False, (32, 32)),  # nothing fits: the smallest is tried
        (32, 32, 1, False, (32, 32)),
    ],
)
def test_sizes(height: int, width: int, free: int, smaller: bool, expected: tuple[int, int]) -> None:
    assert chosen(height, width, free, smaller=smaller)[0] == expected


def test_what_is_asked_for_is_taken() -> None:
    assert chosen(256, 256, 1, 40) == ((40, 40), 10)
    assert chosen(256, 256, 1, 40, overlap=16) == ((40, 40), 2)
    assert chosen(40, 32, 1, 40) == ((40, 32), 0)


def test_sdxl_likes_larger_ones_and_unknown_models_are_not_measured() -> None:
    assert chosen(128, 128, 8000, sdxl=True)[0] == (128, 128)
    assert 96 <= chosen(256, 256, 8000, sdxl=True)[0][0] <= 136
    assert chosen(256, 256, 0, kept=None)[0][0] in (64, 72, 80, 88, 96, 104)
