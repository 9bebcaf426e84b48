"""One amount of memory, shared: never more than there is, and a refusal that says what would do."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.shares import BESIDE, split

MB = 1 << 20


@given(st.integers(1, 1 << 36), st.integers(1, 1 << 28), st.sampled_from([2, 4]), st.sampled_from([2, 4]), st.booleans())
def test_parts_of_the_whole(total: int, largest: int, stored: int, computed: int, on_cpu: bool) -> None:
    try:
        found = split(total, largest, stored, computed, on_cpu)
    except CannotMake as error:
        least = int(re.search(r"(\d+) MB at least", str(error)).group(1)) * MB
        assert least > total
        assert split(least, largest, stored, computed, on_cpu).activations > 0  # what it says would do does
        return
    assert found.weights >= 2 * largest  # I2
    assert found.activations > 0
    converted = (largest * computed // stored) * ((stored != computed) + on_cpu)
    assert found.weights + found.activations + converted + BESIDE <= total


def test_sd15_in_float32_within_800_mb() -> None:
    """Of the 800 MB two fifths are left for activations: a tile of 64 cells needs 200."""
    found = split(800 * MB, 2560 * 1280 * 9 * 2, 2, 4, on_cpu=True)
    assert 300 * MB < found.activations < 400 * MB


def test_a_gpu_has_more_room() -> None:
    assert split(800 * MB, 59 * MB, 2, 2, on_cpu=False).activations > split(800 * MB, 59 * MB, 2, 2, on_cpu=True).activations
