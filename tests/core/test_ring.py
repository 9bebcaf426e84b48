"""The ring: no two live units share a byte, and every byte's earlier readers are waited for before it is overwritten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.places import assign_offsets
from lib_async_lowvram.core.ring import Ring

sizes = st.lists(st.integers(0, 40).map(lambda n: 512 * n), min_size=1, max_size=14)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], dict[int, int], int]:
    nbytes = dict(enumerate(draw(sizes)))
    order = draw(st.permutations(list(nbytes)))
    ring = max(2 * max(nbytes.values()), 512) + 512 * draw(st.integers(0, 60))
    return order, nbytes, ring


@given(layouts(), st.lists(st.tuples(st.integers(0, 13), st.integers(0, 1)), max_size=60))
def test_occupancy_and_fences(layout: tuple[list[int], dict[int, int], int], moves: list[tuple[int, int]]) -> None:
    """A model of every byte: who is there, and the (stream, serial) of the fence left by whoever was there last."""
    order, nbytes, ring_bytes = layout
    offsets = assign_offsets(order, nbytes, ring_bytes)
    ring = Ring(offsets, nbytes, ring_bytes)
    live: set[int] = set()
    left: dict[int, set[tuple[int, int]]] = {}  # granule -> fences of all who were there
    waited: dict[int, int] = {}  # stream -> newest serial the copy stream has waited for
    serial = 0

    def granules(unit: int) -> range:
        return range(offsets[unit] // 512, (offsets[unit] + nbytes[unit]) // 512)

    for number, stream in moves:
        unit = order[number % len(order)]
        if unit in live:
            serial += 1
            ring.vacate(unit, stream, (stream, serial))
            live.remove(unit)
            for granule in granules(unit):
                left.setdefault(granule, set()).add((stream, serial))
            continue
        clash = any(set(granules(unit)) & set(granules(other)) for other in live)
        assert ring.is_free(unit) is not clash
        if clash:
            with pytest.raises(ValueError, match="cannot be placed"):
                ring.occupy(unit)
            continue
        for fence_stream, fence_serial in ring.occupy(unit):
            waited[fence_stream] = max(waited.get(fence_stream, 0), fence_serial)
        live.add(unit)
        for granule in granules(unit):
            for fence_stream, fence_serial in left.get(granule, ()):
                assert waited.get(fence_stream, 0) >= fence_serial
        assert set(ring.live) == live
        assert ring.live_bytes == sum(nbytes[each] for each in live) <= ring_bytes


def test_fences_cover_all_streams() -> None:
    ring = Ring({0: 0, 1: 512}, {0: 512, 1: 512}, 1024)
    ring.occupy(0)
    ring.occupy(1)
    ring.vacate(0, "a", "a1")
    ring.vacate(1, "b", "b1")
    ring.occupy(0)
    ring.vacate(0, "a", "a2")
    assert set(ring.fences().values()) == {"a2", "b1"}
