"""Where passes begin and end: announced or not, with an end of their own or not, cut short, or a stray call that is none."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, attached, call, pair, recorded, same, simulated

CONFIG = OffloadConfig(budget_bytes=1, small_leaf_bytes=0)


class Stop(BaseException):
    """As the WebUI's interrupt: post hooks do not run for it."""


def interrupt(net: Chain, place: int, error: BaseException, streams) -> None:
    def stop(*_: object) -> None:
        raise error

    handle = net.leaves[place].register_forward_pre_hook(stop)
    with pytest.raises(type(error)):
        call(net, streams)
    handle.remove()


@pytest.mark.parametrize("place", [0, 3])
def test_a_stray_call_of_one_leaf_before_learning_is_no_pass(place: int) -> None:
    streams = simulated()
    net, twin = pair(lambda: Chain(12))
    mover = AsyncModelMover(CONFIG, streams).attach({"net": net})
    call(net.leaves[place], streams)  # textual inversion calls token_embedding
    for _ in range(4):
        same(net, twin, streams)
    assert mover.status()["budget_bytes"] == 2 * LEAF_BYTES
    mover.detach()


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
def test_stray_calls_between_passes(budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    for place in (3, 3, 0, 5):
        with torch.no_grad():
            expected = twin.leaves[place](X)
        assert torch.equal(call(net.leaves[place], streams), expected)
        same(net, twin, streams)
    before = mover.status()["misses"]
    same(net, twin, streams)
    assert mover.status()["misses"] == before
    assert mover.status()["networks"]["net"]["relearned"] == 0
    streams.check()
    mover.detach()


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES, 1 << 20])
def test_unannounced_passes_end_where_the_next_one_starts(budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(NetworkSpec([Region(net)], None), streams, budget, run=net, passes=0)
    for _ in range(12):
        same(net, twin, streams)
    status = mover.status()
    assert status["learning_passes"] == 1
    assert status["passes"] >= (10 if budget < 1 << 20 else 0)  # with everything resident nobody sees a pass start
    assert len(mover._networks["net"].order._fired) <= 6
    mover.drain()
    streams.check()
    mover.detach()


def test_prepare_after_an_open_ended_pass() -> None:
    streams = simulated()
    text, unet = pair()
    mover = AsyncModelMover(CONFIG, streams)
    mover.attach({"text": NetworkSpec([Region(text)], text.leaves[0], open_ended=True), "unet": unet})
    for net in (unet, text, text):
        call(net, streams)
    with torch.no_grad():
        mover.prepare("unet")
    assert mover.current_network == "unet"
    mover.detach()


def test_prepare_during_another_networks_pass_does_nothing() -> None:
    streams = simulated()
    one, other = pair()
    mover = AsyncModelMover(CONFIG, streams).attach({"one": one, "other": other})
    for net in (one, other, one):
        call(net, streams)
    seen: list[str | None] = []

    def inside(_: Leaf) -> None:
        mover.prepare("other")
        seen.append(mover.current_network)

    one.leaves[2].inside = inside
    call(one, streams)
    assert seen == ["one"]
    mover.detach()


@pytest.mark.parametrize("error", [ValueError("an error"), Stop()])
@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES, 1 << 20])
def test_a_pass_cut_short(budget: int, place: int, error: BaseException) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget, passes=3)
    before = mover.status()
    interrupt(net, place, error, streams)
    same(net, twin, streams)
    interrupt(net, place, error, streams)
    mover.drain()
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    after = mover.status()
    assert after["passes"] == before["passes"] + 2  # a pass cut short does not count
    assert after["networks"]["net"]["relearned"] == 0
    streams.check()
    mover.detach()


@pytest.mark.parametrize("error", [ValueError("an error"), Stop()])
def test_a_learning_pass_cut_short_teaches_nothing(error: BaseException) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, passes=0)
    interrupt(net, 3, error, streams)
    same(net, twin, streams)
    same(net, twin, streams)
    assert mover.status()["budget_bytes"] == 2 * LEAF_BYTES
    assert mover.status()["passes"] == 1
    streams.check()
    mover.detach()


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
def test_a_unit_changed_and_then_interrupted_is_written_back(budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget, passes=3)

    def change_and_stop(leaf: Leaf) -> None:
        leaf.weight.mul_(0.5)
        raise Stop

    for leaf in net.leaves:
        leaf.inside = change_and_stop
        with pytest.raises(Stop):
            call(net, streams)
    for leaf in twin.leaves:
        with torch.no_grad():
            leaf.weight.mul_(0.5)
    mover.drain()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    same(net, twin, streams)
    streams.check()
    mover.detach()


def test_a_pass_inside_an_except_block_is_complete() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    try:
        raise ValueError("somebody's own")
    except ValueError:
        same(net, twin, streams)
    assert mover.status()["passes"] == 2
    mover.detach()


def test_skipped_and_repeated_leaves() -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams)
    for order in ([0, 1, 5], [2, 2, 3, 0, 0], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]):
        net.order = twin.order = order
        same(net, twin, streams)
    status = mover.status()
    assert status["skipped"] > 0
    same(net, twin, streams)
    assert mover.status()["skipped"] == status["skipped"]
    assert mover.status()["networks"]["net"]["relearned"] == 0
    streams.check()
    mover.detach()
