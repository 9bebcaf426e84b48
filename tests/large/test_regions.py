"""Regions: what is taken, clamped and refused; and that shares of the picture add up."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.large.pieces import BACKGROUND, is_untiled, pieces
from lib_async_lowvram.large.regions import MOST, Region, parse, shares

PLAIN = {"x": 0.25, "y": 0, "width": 0.5, "height": 1, "prompt": "a fox"}


def test_what_is_read() -> None:
    region = Region(0.25, 0.0, 0.5, 1.0, "a fox", None, 1.0)
    assert parse([PLAIN]) == ((region,), ())
    assert parse(json.dumps([PLAIN])) == ((region,), ())
    assert parse([region.as_json()]) == ((region,), ())
    assert parse([region]) == ((region,), ())
    assert parse(json.dumps([{**PLAIN, "negative": "", "weight": 2}]))[0][0] == Region(0.25, 0.0, 0.5, 1.0, "a fox", "", 2.0)
    for none in (None, "", "  ", [], "[]"):
        assert parse(none) == ((), ())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": -0.5}, "region 1: x -0.5 became 0"),
        ({"x": 2}, "region 1: x 2 became 0.99"),
        ({"width": 3}, "region 1: width 3 became 0.75"),
        ({"height": 0}, "region 1: height 0 became 0.01"),
        ({"weight": -1}, "region 1: weight -1 became 0.01"),
        ({"weight": 1e9}, "region 1: weight 1e+09 became 10"),
    ],
)
def test_what_is_out_of_range_is_told(change: dict, said: str) -> None:
    (region,), notes = parse([{**PLAIN, **change}])
    assert said in notes
    assert 0 <= region.x and region.x + region.width <= 1 + 1e-9


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "not JSON"),
        ("3", "a list, not int"),
        ([3], "region 1 is a mapping"),
        ([PLAIN, {**PLAIN, "prompt": " "}], "region 2: prompt"),
        ([{**PLAIN, "prompt": None}], "region 1: prompt"),
        ([{**PLAIN, "negative": 3}], "region 1: negative"),
        ([{**PLAIN, "x": "left"}], "region 1: x is a number"),
        ([{**PLAIN, "x": True}], "region 1: x is a number"),
        ([{**PLAIN, "y": float("nan")}], "region 1: y is a number"),
        ([{"x": 0, "y": 0, "width": 1, "prompt": "a"}], "region 1: height is a number"),
        ([{**PLAIN, "colour": "red"}], "region 1 has no field 'colour'"),
        ([PLAIN] * (MOST + 1), f"more than {MOST}"),
    ],
)
def test_what_is_refused(given: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(given)


sides = st.floats(0, 1)
some_regions = st.lists(
    st.builds(lambda x, y, w, h, weight: {"x": x, "y": y, "width": w, "height": h, "prompt": "a", "weight": weight},
              sides, sides, sides, sides, st.floats(0.01, 10)), max_size=4)


@given(some_regions, st.integers(1, 60), st.integers(1, 60))
def test_shares_add_up_to_one(given: list, height: int, width: int) -> None:
    regions, _ = parse(given)
    found = shares(regions, height, width)
    assert found.shape == (1 + len(regions), height, width) and (found >= 0).all()
    assert (found.sum(0) - 1).abs().max() < 1e-6
    for number, region in enumerate(regions, start=1):
        top, bottom, left, right = region.cells(height, width)
        assert 0 <= top < bottom <= height and 0 <= left < right <= width
        outside = torch.ones(height, width, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        assert (found[number][outside] == 0).all() and found[number].max() > 0


def test_weights_against_background_and_each_other() -> None:
    def middle(*weights: float) -> list[float]:
        regions, _ = parse([{"x": 0, "y": 0, "width": 1, "height": 1, "prompt": "a", "weight": weight} for weight in weights])
        return [float(share) for share in shares(regions, 40, 40)[:, 20, 20]]

    assert middle(1) == [0, 1] and middle(3) == [0, 1]
    assert middle(0.5) == [0.5, 0.5]
    assert middle(1, 3) == [0, 0.25, 0.75]
    assert middle(0.25, 0.25) == pytest.approx([0.6, 0.2, 0.2])


def test_shares_change_smoothly_inside_and_reach_the_picture_s_border() -> None:
    regions, _ = parse([{"x": 0, "y": 0.25, "width": 0.5, "height": 0.5, "prompt": "a"}])
    share = shares(regions, 128, 128)[1]
    assert share[64, 0] == 1 and share[64, 63] < 0.1 and share[64, 64] == 0
    assert (share[:, 1:] - share[:, :-1]).abs().max() < 0.25 and (share[1:] - share[:-1]).abs().max() < 0.25


@given(some_regions, st.integers(8, 60), st.integers(8, 60))
def test_every_cell_has_weight_and_pieces_are_needed(given: list, height: int, width: int) -> None:
    regions, _ = parse(given)
    made = pieces(height, width, (16, 16), 4, regions)
    total = torch.zeros(height, width)
    for piece in made:
        assert piece.weights.shape == (piece.tile.height, piece.tile.width) and piece.weights.max() > 0
        total[piece.tile.rows, piece.tile.columns] += piece.weights
    assert (total > 0).all()
    assert len({(piece.tile, piece.source) for piece in made}) == len(made)


def test_a_prompt_is_only_where_it_counts() -> None:
    everywhere, _ = parse([{"x": 0, "y": 0, "width": 1, "height": 1, "prompt": "a"}])
    assert {piece.source for piece in pieces(64, 64, (32, 32), 8, everywhere)} == {1}
    corner, _ = parse([{"x": 0, "y": 0, "width": 0.1, "height": 0.1, "prompt": "a"}])
    made = pieces(64, 64, (32, 32), 8, corner)
    assert [(piece.tile.y, piece.tile.x) for piece in made if piece.source == 1] == [(0, 0)]
    assert len([piece for piece in made if piece.source == BACKGROUND]) == 9
    assert is_untiled(pieces(32, 32, (32, 32), 8)) and not is_untiled(pieces(32, 32, (32, 32), 8, corner))
    assert not is_untiled(made)
