"""I1 on random module trees: every pass bit for bit as without the mover, while weights really stream, and nobody faults."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mover.trees import Case

BANDWIDTHS = [5e6, 1e8, 1e9, math.inf]  # bytes/s: from starving (weights are some 100 KB) to endless


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0, 2.0]),
    bandwidth=st.sampled_from(BANDWIDTHS),
    jitter=st.sampled_from([0.0, 1e-4]),
    whole=st.booleans(),
    small=st.sampled_from([0, 300, 1 << 20]),
)
def test_same_pixels(seed: int, share: float, bandwidth: float, jitter: float, whole: bool, small: int) -> None:
    with Case(seed, share=share, bandwidth=bandwidth, jitter=jitter, whole=whole, small=small) as case:
        for now in range(6):
            case.run(now)
        status = case.check()
        network = status["networks"]["net"]
        assert status["state"] == "active"
        assert network["passes"] == 5
        assert network["ring_bytes"] + network["resident_bytes"] <= network["budget_bytes"]
        if network["ring_bytes"]:
            assert network["hits"] > 0
            assert network["streamed_bytes"] > network["resident_bytes"]
        if share == 2.0:
            assert network["ring_bytes"] == 0
        assert status["learning_peak_bytes"] > 0


def test_the_cases_stream_at_all() -> None:
    # Guards the test above against an empty promise: on the least budget half of the trees have something that streams.
    streaming = 0
    for seed in range(20):
        with Case(seed) as case:
            for now in range(3):
                case.run(now)
            streaming += case.check()["networks"]["net"]["ring_bytes"] > 0
    assert streaming >= 10
