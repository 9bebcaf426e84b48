"""Followed passes, and whatever comes between: at every place the same bits, a judge without a word, and soon they are followed again."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch

from lib_async_lowvram.steady import SteadyPass
from lib_async_lowvram.transfers import Transfers
from tests.mover.chains import Chain, Leaf, X, call, handed_over, judged, same
from tests.mover.changes import CHANGES, give_bias, halve
from tests.mover.steady_rig import BUDGETS, LEAVES, Asked, made, uneven

pytestmark = pytest.mark.usefixtures("one_plan")


class Stop(BaseException):
    pass


class Failed(Exception):
    pass


def skip(net: Chain, place: int) -> None:
    del net.order[place]


def repeat(net: Chain, place: int) -> None:
    net.order.insert(place, net.order[place])


def repeat_later(net: Chain, place: int) -> None:
    net.order.append(net.order[place])


def swap(net: Chain, place: int) -> None:
    net.order[place], net.order[place - 1] = net.order[place - 1], net.order[place]


def nested(net: Chain, place: int) -> None:
    def call_another(leaf: Leaf) -> None:
        net.leaves[(place + 2) % LEAVES](X)

    net.leaves[place].inside = call_another


def nested_back(net: Chain, place: int) -> None:
    """Its place is the caller's: it gets a block of its own for this once."""
    net.leaves[place].inside = lambda leaf: net.leaves[place - 2](X)


def itself(net: Chain, place: int) -> None:
    net.leaves[place].inside = lambda leaf: leaf(X)


@pytest.mark.parametrize("place", range(LEAVES))
@pytest.mark.parametrize("how", [skip, repeat, repeat_later, swap, nested, nested_back, itself], ids=lambda how: how.__name__)
def test_another_order_at_any_place(how: Callable[[Chain, int], None], place: int, asked: Asked) -> None:
    """Once; then the order is what it was, and soon followed again."""
    net, twin, mover, streams = made()
    for each in (net, twin):
        how(each, place)
    same(net, twin, streams)
    for each in (net, twin):
        each.order = list(range(LEAVES))
    for _ in range(3):
        same(net, twin, streams)
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    assert mover.status()["networks"]["net"]["relearned"] == 0
    streams.check()


@pytest.mark.parametrize("place", range(LEAVES))
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["inside", "between", "before its use", "after its use"])
def test_changed_at_any_place(change: Callable[[Leaf], None], place: int, when: str, asked: Asked) -> None:
    net, twin, mover, streams = made()

    def change_there(leaf: Leaf) -> None:
        streams.synchronize(streams.record(streams.onload_stream))  # its copy may be under way, and reads what is about to be written
        change(leaf)

    for each in (net, twin):
        other = {"before its use": place - 1, "after its use": place + 1}.get(when, place) % LEAVES
        if when == "between":
            with torch.no_grad():
                change(each.leaves[place])
        elif other == place:
            each.leaves[place].inside = change
        else:
            each.leaves[other].inside = lambda leaf, each=each: change_there(each.leaves[place])
    for _ in range(4):
        same(net, twin, streams)
    status = mover.status()
    assert status["write_backs"] <= 1 and status["networks"]["net"]["learning_passes"] == 1 and status["networks"]["net"]["skipped"] == 0
    assert all(unit.written is None for unit in mover._networks["net"].contents.units), "that is long over"
    if change is not give_bias:  # otherwise the plan's places are too small by now, and units on demand
        assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    mover.drain()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    streams.check()


@pytest.mark.parametrize("place", range(LEAVES))
def test_told_of_a_change_at_any_place(place: int) -> None:
    """`mark_dirty`: written through `.data`, which leaves no trace."""
    net, twin, mover, streams = made()
    for each in (net, twin):
        each.leaves[place].weight.data.mul_(0.5)
    mover.mark_dirty(net.leaves[place])
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["refetches"] <= 1
    streams.check()


@pytest.mark.parametrize("place", range(LEAVES))
@pytest.mark.parametrize("error", [Stop, Failed])
def test_cut_short_at_any_place(place: int, error: type[BaseException], asked: Asked) -> None:
    net, twin, mover, streams = made()

    def fail(leaf: Leaf) -> None:
        raise error

    net.leaves[place].inside = fail
    with suppress(Stop, Failed):
        call(net, streams)
    for _ in range(3):
        same(net, twin, streams)
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    mover.drain()
    assert streams.allocated_bytes == 0
    streams.check()


@pytest.mark.parametrize("place", range(LEAVES))
def test_left_and_drained_at_any_place(place: int, asked: Asked) -> None:
    """Between two leaves of a pass, by its own thread: nothing of it is on the device then."""
    net, twin, mover, streams = made()
    with judged(streams), torch.no_grad():
        x = y = X
        for number, (mine, theirs) in enumerate(zip(net.leaves, twin.leaves, strict=True)):
            if number == place:
                with suppress(Failed):
                    net.leaves[number].inside = fail_once
                    net(X)
                mover.drain()
                assert streams.allocated_bytes == 0
            x, y = mine(x), theirs(y)
            assert torch.equal(x, y)
    for _ in range(4):
        same(net, twin, streams)
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    streams.check()


def fail_once(leaf: Leaf) -> None:
    raise Failed


@pytest.mark.parametrize("place", range(LEAVES))
def test_gradients_come_on_at_any_place(place: int, asked: Asked) -> None:
    net, twin, mover, streams = made()
    x, y = X.clone(), X.clone()
    net.leaves[place].inside = lambda leaf: torch.set_grad_enabled(True)
    with judged(streams), torch.no_grad():
        x = net(x)
    with torch.no_grad():
        y = twin(y)
    assert torch.equal(x, y)
    for _ in range(5):
        same(net, twin, streams)
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    streams.check()


def test_on_another_thread_each_time(asked: Asked) -> None:
    """Another thread is another stream: the first use there goes on behind the last one here."""
    net, twin, mover, streams = made()
    for _ in range(3):
        handed_over(lambda: same(net, twin, streams), streams)
        assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    streams.check()


@pytest.mark.parametrize("place", range(1, LEAVES))
def test_another_thread_goes_on_in_the_middle(place: int, asked: Asked) -> None:
    net, twin, mover, streams = made()
    with torch.no_grad():
        expected = twin(X)

    def rest(x: torch.Tensor) -> torch.Tensor:
        with judged(streams):
            for leaf in net.leaves[place:]:
                x = leaf(x)
                assert streaming.consumer is streams.current_stream(), "who joins in at the end must know"
            return x

    with judged(streams), mover.running("net"):
        x = X
        for leaf in net.leaves[:place]:
            x = leaf(x)
        streaming = mover._networks["net"].streaming
        assert streaming.consumer is streams.current_stream()
        got = handed_over(lambda: rest(x), streams)
    assert torch.equal(got, expected)
    for _ in range(3):
        same(net, twin, streams)
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    streams.check()


def test_a_new_order_is_followed_in_its_turn(asked: Asked) -> None:
    net, twin, mover, streams = made()
    for each in (net, twin):
        each.order = [0, 2, 1, 3, 5, 4]
    for _ in range(4):
        same(net, twin, streams)
    assert mover.status()["networks"]["net"]["relearned"] == 1
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    streams.check()


# -- leaves of all sizes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", range(12))
def test_anything_at_any_time(budget: int, seed: int, asked: Asked) -> None:
    """Passes that skip, repeat, swap, change, are cut short - some of them, at random."""
    net, twin, mover, streams = uneven(budget)
    chance = random.Random(seed)
    count = len(net.leaves)
    for _ in range(16):
        place, what = chance.randrange(count), chance.randrange(9)
        for each in (net, twin):
            each.order = list(range(count))
            if what == 0:
                del each.order[place]
            elif what == 1:
                del each.order[place:]
            elif what == 2:
                each.order[place], each.order[place - 1] = each.order[place - 1], each.order[place]
            elif what == 3:
                each.order.insert(place // 2, place)
            elif what == 4:
                each.leaves[place].inside = halve
        if what == 5:
            net.leaves[place].inside = fail_once
            with suppress(Failed):
                call(net, streams)
        same(net, twin, streams)
    for each in (net, twin):
        each.order = list(range(count))
    for _ in range(4):
        same(net, twin, streams)
    assert asked.during(lambda: same(net, twin, streams))[0] == 0
    streams.check()
    mover.drain()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("owner", "name"), [(Transfers, "onload_again"), (SteadyPass, "acquire"), (SteadyPass, "release")])
def test_the_device_refuses_at_any_place(owner: type, name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error goes to the host; everything is back there, and nothing is freed that is still being discarded."""
    number, left = 0, 1
    original = getattr(owner, name)
    while left:
        net, twin, mover, streams = uneven(budget)
        before = [number]

        def refuse(self: object, unit: object, before: list[int] = before) -> object:
            before[0] -= 1
            if before[0] == -1:
                raise RuntimeError("refused")
            return original(self, unit)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, refuse)
            try:
                call(net, streams)
                left = 0
            except RuntimeError:
                assert streams.allocated_bytes == 0
        for _ in range(2):
            same(net, twin, streams)
        streams.check()
        number += 1
    assert number > 3
