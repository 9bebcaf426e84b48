"""Reading settings that nobody validated: always a usable config, and a reason for every value changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.config import MIB, OffloadConfig

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(anything, anything, anything)
def test_parse_never_raises_and_stays_in_range(lookahead: object, budget: object, pinned: object) -> None:
    config, messages = OffloadConfig.parse({"lookahead_mb": lookahead, "budget_mb": budget, "pinned_mb": pinned})
    assert 0 <= config.lookahead_bytes <= 4096 * MIB
    assert 0 <= config.budget_bytes <= 24576 * MIB
    assert 0 <= config.pinned_limit_bytes <= 65536 * MIB
    assert all(len(message) < 200 for message in messages)


@pytest.mark.parametrize(
    ("value", "megabytes", "says"),
    [
        (512, 512, ""),
        ("256", 256, ""),
        (0, 0, ""),
        (0.5, 0.5, ""),
        ("abc", 0, "not a number"),
        (-5, 0, "negative"),
        (1e9, 4096, "lowered to 4096"),
        (10**400, 4096, "lowered to 4096"),
        (float("inf"), 4096, "lowered to 4096"),
        (float("nan"), 0, "not a number"),
        (None, 0, "empty"),
        (True, 0, "a bool is not a number"),
        ([1], 0, "a list is not a number"),
    ],
)
def test_values(value: object, megabytes: float, says: str) -> None:
    config, messages = OffloadConfig.parse({"lookahead_mb": value})
    assert config.lookahead_bytes == int(megabytes * MIB)
    assert bool(messages) is bool(says)
    assert says in "".join(messages)


def test_absent_means_automatic() -> None:
    config, messages = OffloadConfig.parse({})
    assert (config.lookahead_bytes, config.budget_bytes, config.pinned_limit_bytes, messages) == (0, 0, 0, [])


@pytest.mark.parametrize("value", [-1, 1.5, True, "1"])
def test_the_constructor_is_strict(value: object) -> None:
    with pytest.raises(ValueError, match="budget_bytes"):
        OffloadConfig(budget_bytes=value)
