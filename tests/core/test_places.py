"""Places in the ring: inside it, aligned, and never worse than they need be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.places import assign_offsets, overlaps, steps_back

sizes = st.lists(st.integers(0, 40).map(lambda n: 512 * n), min_size=1, max_size=14)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], dict[int, int], int]:
    nbytes = dict(enumerate(draw(sizes)))
    order = draw(st.permutations(list(nbytes)))
    ring = max(2 * max(nbytes.values()), 512) + 512 * draw(st.integers(0, 60))
    return order, nbytes, ring


@given(layouts(), st.booleans())
def test_every_place_is_inside_and_aligned(layout: tuple[list[int], dict[int, int], int], spread: bool) -> None:
    order, nbytes, ring = layout
    offsets = assign_offsets(order, nbytes, ring, spread=spread)
    assert set(offsets) == set(order)
    for unit, offset in offsets.items():
        assert 0 <= offset <= ring - nbytes[unit]
        assert offset % 512 == 0


@given(layouts())
def test_overlaps_against_all_pairs(layout: tuple[list[int], dict[int, int], int]) -> None:
    order, nbytes, ring = layout
    offsets = assign_offsets(order, nbytes, ring)
    found = overlaps(offsets, nbytes)
    for one in order:
        expected = {
            other
            for other in order
            if other != one and max(offsets[one], offsets[other]) < min(offsets[one] + nbytes[one], offsets[other] + nbytes[other])
        }
        assert set(found[one]) == expected


@pytest.mark.parametrize("small", [512, 1024, 4608])
def test_two_large_units_in_a_row_never_share_a_place(small: int) -> None:
    """What a ring of twice the largest unit is for: the second can be copied while the first computes."""
    large = 8192
    nbytes = {0: small, 1: large, 2: large, 3: large, 4: small, 5: large}
    neighbours = overlaps(assign_offsets(list(nbytes), nbytes, 2 * large, spread=True), nbytes)
    assert 2 not in neighbours[1]
    assert 3 not in neighbours[2]


def test_a_unit_larger_than_the_ring_is_refused() -> None:
    with pytest.raises(ValueError, match="1024 bytes does not fit"):
        assign_offsets([0], {0: 1024}, 512)


@given(layouts(), st.booleans())
def test_steps_back_against_all_pairs(layout: tuple[list[int], dict[int, int], int], spread: bool) -> None:
    order, nbytes, ring = layout
    offsets = assign_offsets(order, nbytes, ring, spread=spread)
    count, neighbours = len(order), overlaps(offsets, nbytes)
    places = {unit: place for place, unit in enumerate(order)}
    expected = [min([count, *((places[unit] - places[other]) % count for other in neighbours[unit])]) for unit in order]
    assert steps_back(order, nbytes, offsets, ring) == expected


def test_equal_units_take_turns() -> None:
    """As many live at once as fit, and the oldest makes way."""
    order, nbytes = list(range(7)), dict.fromkeys(range(7), 512)
    offsets = assign_offsets(order, nbytes, 3 * 512)
    assert [offsets[unit] // 512 for unit in order] == [0, 1, 2, 0, 1, 2, 0]
    assert steps_back(order, nbytes, offsets, 3 * 512)[3:] == [3, 3, 3, 3]
