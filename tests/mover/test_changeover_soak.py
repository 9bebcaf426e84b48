"""Budgets that change between any two passes, while weights change anywhere, passes are cut short, and orders jump: the same bits."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, recorded

RING = 2 * LEAF_BYTES
LEAVES = 6
EXAMPLES = int(os.environ.get("ASYNC_LOWVRAM_SOAK", "40"))

actions = st.one_of(
    st.tuples(st.just("budget"), st.integers(0, 3)),
    st.tuples(st.just("write inside"), st.integers(0, LEAVES - 1)),
    st.tuples(st.just("write between"), st.integers(0, LEAVES - 1)),
    st.tuples(st.just("replace between"), st.integers(0, LEAVES - 1)),
    st.tuples(st.just("bias inside"), st.integers(0, LEAVES - 1)),
    st.tuples(st.just("cut short"), st.integers(0, LEAVES - 1)),
    st.tuples(st.just("order"), st.permutations(range(LEAVES))),
    st.tuples(st.just("drain"), st.just(0)),
)


def halve(leaf: nn.Module) -> None:
    leaf.weight.mul_(0.5)


def replace(leaf: nn.Module) -> None:
    leaf.weight = nn.Parameter(leaf.weight.detach().clone() + 0.25, requires_grad=False)


def bias(leaf: nn.Module) -> None:
    leaf.bias = nn.Parameter(torch.full((1,), 0.5, device=leaf.weight.device), requires_grad=False)


def cut(leaf: nn.Module) -> None:
    raise KeyboardInterrupt


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.lists(actions, max_size=3), min_size=3, max_size=14))
def test_the_same_bits_whatever_happens(passes: list[list[tuple]]) -> None:
    streams = recorded(bandwidth=2e7)
    net, twin = pair(lambda: Chain(LEAVES))
    mover = attached(net, streams, RING + 2 * LEAF_BYTES, lookahead_bytes=RING)
    for events in passes:
        cuts = [which for what, which in events if what == "cut short"]
        for what, which in events:
            if what == "budget":
                mover._context.budget = lambda key, leaves=which: RING + leaves * LEAF_BYTES
            elif what == "order":
                net.order = twin.order = list(which)
            elif what == "drain":
                mover.drain()
            elif what.endswith("between"):
                mover.drain()  # the rule for whoever changes weights on the host
                for model in (net, twin):
                    with torch.no_grad():
                        (halve if what.startswith("write") else replace)(model.leaves[which])
        if cuts:
            net.leaves[cuts[0]].inside = cut
            with pytest.raises(KeyboardInterrupt):
                call(net, streams)
        for what, which in events:
            if what.endswith("inside"):
                for model in (net, twin):
                    model.leaves[which].inside = halve if what.startswith("write") else bias
        with torch.no_grad():
            expected = twin(torch.ones(1, 8))
        assert torch.equal(call(net, streams), expected)
        assert mover.status()["state"] == "active"
        assert streams.allocated_bytes <= RING + (3 + 2) * LEAF_BYTES  # a unit that outgrew its place has a block of its own
    mover.drain()
    assert streams.allocated_bytes == 0
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    mover.detach()
    streams.check()
