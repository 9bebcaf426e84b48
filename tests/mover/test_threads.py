"""Passes, drains and preparations on other threads, each with a compute stream of its own: everything stays ordered."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from lib_async_lowvram import NetworkSpec, Region
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, attached, call, on_thread, pair, recorded, same, simulated

PATIENCE = 60
BUDGETS = [1, 5 * LEAF_BYTES, 1 << 20]


class Stop(BaseException):
    """As the WebUI's interrupt: post hooks do not run for it."""


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_passes_on_several_threads(budget: int, poison: bool) -> None:
    streams = recorded(poison=poison)
    net, twin = pair()
    mover = attached(net, streams, budget, passes=1)
    for _ in range(3):
        on_thread(lambda: same(net, twin, streams))
        same(net, twin, streams)
    on_thread(mover.drain)
    streams.check()
    mover.detach()


@pytest.mark.parametrize("budget", BUDGETS[:2])
def test_a_pass_opened_on_one_thread_and_run_on_another(budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(NetworkSpec([Region(net)], None), streams, budget, passes=0)
    with torch.no_grad(), mover.running("net"):
        same(net, twin, streams)
    with torch.no_grad(), mover.running("net"):
        on_thread(lambda: same(net, twin, streams))
    mover.drain()
    streams.check()
    mover.detach()


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_drain_from_another_thread_between_passes(budget: int, change: bool) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    if change:
        for chain in (net, twin):
            chain.leaves[1].inside = chain.leaves[5].inside = lambda leaf: leaf.weight.mul_(0.5)
    same(net, twin, streams)
    on_thread(mover.drain)
    assert streams.allocated_bytes == 0
    streams.check()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    mover.detach()


def test_prepare_on_another_thread() -> None:
    def tied() -> Chain:
        chain = Chain()
        chain.leaves[1].weight = chain.leaves[0].weight  # a resident that nobody announces
        return chain

    streams = recorded()
    net, twin = pair(tied)
    mover = attached(net, streams)
    mover.drain()
    on_thread(lambda: torch.no_grad()(mover.prepare)("net"))
    assert mover.current_network == "net"
    same(net, twin, streams)
    mover.drain()
    streams.check()
    mover.detach()


def test_a_region_pass_closed_by_another_thread_waits_for_the_first_ones_uses() -> None:
    streams = recorded()
    net, _ = pair()
    mover = attached(net, streams, passes=0)

    def stop(*_: object) -> None:
        raise Stop

    handle = net.leaves[4].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        call(net, streams)
    handle.remove()
    on_thread(mover.drain)
    assert streams.allocated_bytes == 0
    streams.check()
    mover.detach()


@pytest.mark.parametrize("method", ["drain", "detach", "close"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_what_another_thread_asks_for_in_the_middle_of_a_pass_is_done_at_its_end(budget: int, method: str) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    seen: list[tuple] = []

    def inside(leaf: Leaf) -> None:
        on_thread(getattr(mover, method))
        seen.append((mover.current_network, streams.allocated_bytes > 0, streams.owns(leaf.weight.data_ptr())))

    net.leaves[2].inside = inside
    same(net, twin, streams)
    assert seen == [("net", True, True)]
    assert mover.current_network is None
    assert mover.is_attached == (method == "drain")
    assert streams.allocated_bytes == 0
    streams.check()
    mover.detach()


def test_a_drain_asked_for_while_a_pass_waits_on_another_thread() -> None:
    # The pass stands still inside a leaf on one thread until the other has asked.
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    entered, asked = threading.Event(), threading.Event()

    def inside(_: Leaf) -> None:
        entered.set()
        asked.wait()

    net.leaves[3].inside = inside

    def ask() -> None:
        entered.wait()
        mover.drain()
        assert mover.in_pass
        asked.set()

    asker = threading.Thread(target=ask)
    asker.start()
    same(net, twin, streams)
    asker.join()
    assert not mover.in_pass
    assert streams.allocated_bytes == 0
    mover.detach()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_what_is_asked_for_during_a_stray_call_waits_for_its_end(budget: int, passes: int, asked: bool) -> None:
    """A leaf called on its own, as `encode_embedding_init_text` does while a model is loaded: nobody announces a pass, and the
    region it brought, or the resident it reads, must not go while it runs."""
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget, passes=passes)
    before = [twin.leaves[0](X).detach(), twin.leaves[2](X).detach()]
    seen: list[bool] = []

    def inside(leaf: Leaf) -> None:
        seen.append(streams.owns(leaf.weight.data_ptr()))
        if asked:
            on_thread(mover.drain)
        seen.append(streams.owns(leaf.weight.data_ptr()))

    for place, expected in zip((0, 2), before, strict=True):
        net.leaves[place].inside = inside
        assert torch.equal(call(net.leaves[place], streams), expected)
    assert seen == [True] * 4
    assert mover.status()["placement_faults"] == 0
    on_thread(mover.drain)
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    streams.check()
    mover.detach()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("passes", [0, 1, 3])
def test_what_is_asked_for_during_an_open_ended_pass_waits_for_the_leaf_that_runs(budget: int, passes: int) -> None:
    streams = recorded()
    text, twin = pair()
    mover = attached(NetworkSpec([Region(text)], text.leaves[0], open_ended=True), streams, budget, run=text, passes=passes)
    seen: list[bool] = []

    def inside(leaf: Leaf) -> None:
        on_thread(mover.drain)
        seen.append(streams.owns(leaf.weight.data_ptr()))

    for leaf in (text.leaves[0], text.leaves[4]):
        leaf.inside = inside
    same(text, twin, streams)
    assert seen == [True] * 2
    assert mover.status()["placement_faults"] == 0
    on_thread(mover.drain)
    assert streams.allocated_bytes == 0
    same(text, twin, streams)
    streams.check()
    mover.detach()


def test_drain_from_another_thread_after_an_open_ended_pass_is_done_at_once() -> None:
    streams = simulated()
    text, _ = pair()
    mover = attached(NetworkSpec([Region(text)], text.leaves[0], open_ended=True), streams, run=text, passes=3)
    on_thread(mover.drain)
    assert streams.allocated_bytes == 0
    mover.detach()


@pytest.mark.parametrize("passes", [0, 2])
def test_drain_from_another_thread_after_an_interrupt_is_done_at_once(passes: int) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, passes=passes)

    def stop(*_: object) -> None:
        raise Stop

    handle = net.leaves[2].register_forward_pre_hook(stop)
    with pytest.raises(Stop):
        call(net, streams)
    handle.remove()
    on_thread(mover.drain)
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    mover.detach()


def test_configure_and_status_from_another_thread_in_the_middle_of_a_pass() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    config = type(mover.config)(budget_bytes=1 << 20, small_leaf_bytes=0)
    seen: list[int] = []

    def inside(_: nn.Module) -> None:
        on_thread(lambda: mover.configure(config))
        seen.append(on_thread(mover.status)["ring_bytes"])

    net.leaves[2].inside = inside
    same(net, twin, streams)
    assert seen == [2 * LEAF_BYTES]
    assert mover.status()["ring_bytes"] == 2 * LEAF_BYTES
    call(net, streams, X)
    assert mover.status()["ring_bytes"] == 0
    assert mover.status()["resident_bytes"] == 6 * LEAF_BYTES
    mover.detach()


def test_residents_used_for_the_first_time_on_another_thread_than_the_pass_was_opened_on():
    streams = recorded()
    net, twin = pair()
    mover = attached(NetworkSpec([Region(net)], None), streams, 1 << 20, passes=0)
    with torch.no_grad(), mover.running("net"):
        same(net, twin, streams)
    with torch.no_grad(), mover.running("net"):
        on_thread(lambda: same(net, twin, streams))
    mover.drain()
    mover.detach()
    streams.check()
