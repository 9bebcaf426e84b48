"""Passes that somebody opens with `running`: nothing runs yet, so the mode at the opening says nothing about gradients. The first
module to fire tells.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lib_async_lowvram import NetworkSpec, Region
from tests.mover.chains import X, attached, pair, recorded, same, simulated
from tests.mover.zoo import EVERYTHING, every_budget


def opened(budget: int, streams: object) -> tuple:
    net, twin = pair()
    return net, twin, attached(NetworkSpec([Region(net)], None), streams, budget, passes=0)


@every_budget
@pytest.mark.parametrize("make", [simulated, recorded])
def test_an_announced_pass_learns_and_streams_whatever_the_mode_was_then(make: Callable, budget: int) -> None:
    streams = make()
    net, twin, mover = opened(budget, streams)
    assert torch.is_grad_enabled()
    for number in range(4):
        with mover.running("net"):
            same(net, twin, streams)
        status = mover.status()
        assert (status["learning_passes"], status["passes"]) == (1, number)
    assert status["placement_faults"] == 0
    if budget == 1:
        assert status["streamed_bytes"] > 0
    mover.drain()
    assert streams.allocated_bytes == 0
    mover.detach()


@every_budget
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("announced_with", [False, True])
def test_an_announced_pass_with_gradients(budget: int, streamed: bool, announced_with: bool) -> None:
    streams = simulated()
    net, twin, mover = opened(budget, streams)
    for _ in range(3 if streamed else 0):
        with torch.no_grad(), mover.running("net"):
            same(net, twin, streams)
    with torch.set_grad_enabled(announced_with), mover.running("net"), torch.enable_grad():
        got = net(X)
    assert torch.equal(got, twin(X))
    got.sum().backward()
    twin(X).sum().backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    for _ in range(3):
        with mover.running("net"):
            same(net, twin, streams)
    assert mover.status()["passes"] >= 2
    assert mover.status()["placement_faults"] == 0
    mover.detach()


def test_a_learning_pass_with_gradients_keeps_nothing_that_would_be_written_again() -> None:
    # The graph still has the old bytes when the next pass brings others.
    streams = simulated()
    net, twin, mover = opened(EVERYTHING, streams)
    with torch.no_grad(), mover.running("net"), torch.enable_grad():
        got = net(X)
    expected = twin(X)
    for chain in (net, twin):
        for leaf in chain.leaves:
            leaf.weight.data = leaf.weight.data * 2
    with torch.no_grad(), mover.running("net"):
        same(net, twin, streams)
    got.sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    mover.detach()


def test_an_announced_pass_in_which_nothing_runs() -> None:
    streams = simulated()
    net, twin, mover = opened(1, streams)
    for _ in range(2):
        with mover.running("net"):
            assert mover.in_pass
        assert not mover.in_pass
        with mover.running("net"):
            same(net, twin, streams)
    assert mover.status()["learning_passes"] == 1
    mover.detach()


def test_an_announced_pass_that_fails_before_anything_runs() -> None:
    streams = simulated()
    net, twin, mover = opened(1, streams)
    for _ in range(3):
        with pytest.raises(ValueError), mover.running("net"):
            raise ValueError
        with mover.running("net"):
            same(net, twin, streams)
    assert streams.allocated_bytes > 0
    mover.detach()
    assert streams.allocated_bytes == 0
