"""What passes need beside the weights: seen, bounded by larger ones, scaled from smaller ones; and the budget that follows."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram.activations import Activations
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.context import STEP, Context
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from tests.mover.chains import attached, call, pair, simulated

SMALL, LARGE, HUGE = (("unet", ((2, 4, side, side),)) for side in (64, 128, 256))


def test_what_was_seen_and_what_follows_from_it() -> None:
    known = Activations()
    assert known.expected(SMALL, 7) == 7  # nothing known: whatever anything needed
    known.passed(SMALL, 100)
    known.passed(("vae", None), 900)
    known.passed(SMALL, 900)  # nothing grew in that pass
    assert known.expected(SMALL, 900) == 100
    assert known.expected(LARGE, 900) == 500  # four times as much, and a quarter more
    known.passed(LARGE, 1000)
    assert known.expected(LARGE, 1000) == 1000
    assert known.expected(("unet", ((1, 4, 64, 64),)), 1000) == 100
    assert known.expected(("unet", ((2, 4, 96, 96),)), 1000) == 1000
    assert known.expected(HUGE, 1000) == 5000
    assert known.expected(("text", None), 1000) == 1000


class Growing(SimulatedStreams):
    grown = 0

    def activation_growth(self) -> int:
        return self.grown


def test_the_automatic_budget_leaves_what_such_passes_need() -> None:
    streams = simulated(Growing, capacity_bytes=40 * STEP)
    config = OffloadConfig(reserve_bytes=4 * STEP)
    context = Context(streams, HostMemory(streams), config)
    assert context.budget(SMALL) == 36 * STEP
    streams.grown = 3 * STEP
    context.note_activations(SMALL)
    assert context.budget(SMALL) == 35 * STEP  # known: half the reserve is enough
    assert context.budget(LARGE) == 21 * STEP  # 40 - 4 * 3 * 1.25 - 4
    streams.grown = 10 * STEP
    context.note_activations(SMALL)  # grown by somebody else since: such passes are known
    context.note_activations(LARGE)
    assert (context.budget(SMALL), context.budget(LARGE)) == (35 * STEP, 28 * STEP)


def test_a_host_that_needs_more_free() -> None:
    streams = simulated(Growing, capacity_bytes=40 * STEP)
    context = Context(streams, HostMemory(streams), OffloadConfig(reserve_bytes=4 * STEP))
    asked = []
    context.keep_free = lambda *about: asked.append(about) or 10 * STEP
    assert context.budget(SMALL) == 30 * STEP
    assert asked == [(*SMALL, 40 * STEP)]
    context.config = OffloadConfig(budget_bytes=35 * STEP)
    assert context.budget(SMALL) == 35 * STEP  # a budget that somebody set is theirs


@pytest.mark.parametrize("side", [1, 5])
def test_passes_are_noted_under_their_shape(side: int) -> None:
    streams = simulated(Growing)
    net, _ = pair()
    mover = attached(net, streams, 0, passes=0, reserve_bytes=1 << 20)
    streams.grown = 123
    for _ in range(3):
        call(net, streams, torch.ones(side, 8))
    assert mover._context.activations.knows(("net", ((side, 8),)))
    mover.detach()
