"""What is asked for large pictures, whatever it is written as."""

from __future__ import annotations

import math

import pytest

from lib_async_lowvram.large.settings import AUTOMATIC, OFF, ON, LargePictures, read

REGION = {"x": 0.0, "y": 0.0, "width": 0.5, "height": 1.0, "prompt": "a tree"}


def test_off_asks_for_nothing_and_reads_nothing() -> None:
    for mode in (OFF, "off", "", None):
        assert read(mode, "nonsense", "nonsense", "nonsense") == (LargePictures(), ())
    assert LargePictures().off


def test_automatic_is_zero() -> None:
    for nothing in (0, 0.0, None, "", "0"):
        assert read("automatic", nothing, nothing) == (LargePictures(AUTOMATIC), ())


def test_what_fits_is_kept() -> None:
    settings, notes = read(ON, 512, "128", [REGION])
    assert (settings.mode, settings.tile, settings.overlap, len(settings.regions), notes) == (ON, 512, 128, 1, ())
    assert settings.overlap_of(512) == 128


@pytest.mark.parametrize(
    ("tile", "overlap", "expected"),
    [(500, 0, (512, None)), (1, 0, (256, None)), (9999, 0, (4096, None)), (512, 400, (512, 256)), (512, 3, (512, 8)), (-64, -8, (256, 8))],
)
def test_the_nearest_usable_number(tile: float, overlap: float, expected: tuple[int | None, int | None]) -> None:
    settings, notes = read(ON, tile, overlap)
    assert (settings.tile, settings.overlap) == expected
    assert len(notes) == (expected[0] != tile) + (expected[1] is not None and expected[1] != overlap)


@pytest.mark.parametrize("value", ["many", math.nan, math.inf, [1]])
def test_what_is_no_number_is_automatic(value: object) -> None:
    settings, notes = read(ON, value)
    assert settings.tile is None and "is not a number" in notes[0]


def test_the_default_overlap_is_a_quarter() -> None:
    settings, _ = read(ON)
    assert [settings.overlap_of(tile) for tile in (256, 512, 960)] == [64, 128, 240]


@pytest.mark.parametrize(("mode", "regions", "said"), [("loud", None, "none of Off, Automatic, On"), (ON, [{"x": 0}], "region 1")])
def test_what_cannot_be_read_is_an_error(mode: str, regions: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(mode, 0, 0, regions)
