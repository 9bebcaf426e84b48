"""What every test runs under: derandomised Hypothesis, seeded torch, one compute thread, no GPU tests without a GPU."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, settings

from lib_async_lowvram.learned import Learned

# Derandomised: a red run can be repeated, and a green one stays green. No deadline: the machine may be busy.
settings.register_profile(
    "async-lowvram", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("async-lowvram")


def pytest_configure(config: pytest.Config) -> None:
    # Sums taken by one thread do not depend on how many there are, and simulated copy engines keep a core to themselves.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """Many tests look whether something is left, by a full garbage collection: without torch and all test items to go through, that takes
    a hundredth of the time (of the suite's 870 s it took some 250)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded_torch() -> None:
    torch.manual_seed(0)


@pytest.fixture
def same_plan(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As though every leaf took 100 us and the link did 1 GB/s (or the fixture's parameter), always: which leaves are resident, and which
    share a place in the ring, is not left to what is measured."""
    of = Learned.of
    bandwidth = getattr(request, "param", 1e9)

    def figures(*args: object) -> Learned:
        learned = of(*args)
        return replace(learned, lead_seconds=0.0, bandwidth=bandwidth, steps=tuple((unit, 1e-4) for unit, _ in learned.steps))

    monkeypatch.setattr(Learned, "of", figures)
    for name in ("refined", "timed", "linked"):
        monkeypatch.setattr(Learned, name, lambda self, *args, **kwargs: self)
