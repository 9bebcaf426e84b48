"""Sizes and amounts as people write them; what makes no sense says so."""

from __future__ import annotations

import pytest

from lib_async_lowvram.standalone.request import amount, size


@pytest.mark.parametrize(("text", "expected"), [("2048x2048", (2048, 2048)), (" 512 X 768 ", (512, 768)), ("64x16384", (64, 16384))])
def test_sizes(text: str, expected: tuple[int, int]) -> None:
    assert size(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [("2048", "is no size"), ("axb", "is no size"), ("", "is no size"), ("-64x64", "is no size"), ("1e3x64", "is no size"),
     ("100x512", "width of 100"), ("512x100", "height of 100"), ("0x64", "width of 0"), ("64x16448", "height of 16448")],
)  # fmt: skip
def test_no_sizes(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        size(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("800MB", 800 << 20), ("1.5GB", 3 << 29), ("900000000", 900000000), ("64 mb", 64 << 20), ("2g", 2 << 30), ("10kB", 10240), ("5B", 5)],
)
def test_amounts(text: str, expected: int) -> None:
    assert amount(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1e9", "inf", "nan", "800 MiBi", "8" * 40])
def test_no_amounts(text: str) -> None:
    with pytest.raises(ValueError, match="is no amount of memory"):
        amount(text)
