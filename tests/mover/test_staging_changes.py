"""Units that travel through the staging ring and are changed, and passes that are cut short meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from lib_async_lowvram import OffloadConfig
from lib_async_lowvram.core.states import ONLOADING
from lib_async_lowvram.device.staging import Staged, Stager
from lib_async_lowvram.device.streams import Event
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, attached, call, on_thread, pair, same, simulated
from tests.mover.changes import CHANGES, halve
from tests.mover.staging_rig import ALL, SLOW, Stop, finished, judged, staged
from tests.mover.zoo import EVERYTHING

pytestmark = pytest.mark.usefixtures("the_limit_holds")


@pytest.mark.parametrize("limit", [LEAF_BYTES, 4 * LEAF_BYTES])
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES, EVERYTHING])
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("change", CHANGES)
def test_changes_inside_a_pass(change: Callable[[Leaf], None], place: int, budget: int, limit: int) -> None:
    net, twin, mover, streams = staged(limit, budget=budget)
    for leaf in (net.leaves[place], twin.leaves[place]):
        leaf.inside = change
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_the_thread_is_told_of_write_backs_until_it_has_waited_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onload of a changed unit that is let go of leaves the wait to the next one."""
    told: list[tuple[int, Event | None]] = []
    submit = Stager.submit

    def spy(self: Stager, memory: torch.Tensor, master: torch.Tensor, after: Event | None = None, timed: Any = None) -> Staged:
        told.append((master.data_ptr(), after))
        return submit(self, memory, master, after, timed)

    monkeypatch.setattr(Stager, "submit", spy)
    net, twin, mover, streams = staged(LEAF_BYTES)
    net.leaves[0].inside = twin.leaves[0].inside = halve
    same(net, twin, streams)
    unit = mover._networks["net"].contents.units[0]
    mine = [after for address, after in told if address == unit.master.data_ptr()]
    assert mine[-1] is not None and unit.written is mine[-1]
    assert mine[:-1] == [None] * (len(mine) - 1)
    told.clear()
    streaming = mover._networks["net"].streaming
    assert unit.state is ONLOADING
    streaming._slots.vacate(unit, streams.current_stream())
    streaming._slots.onload(unit)
    assert told == [(unit.master.data_ptr(), mine[-1])]
    same(net, twin, streams)
    assert unit.written is None
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_passes(change: Callable[[Leaf], None], place: int, ahead: bool) -> None:
    """Also while onloads of the next pass are queued, or waiting in the ring."""
    net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW))  # the judge would be right to complain of `ahead`
    for _ in range(2):
        if not ahead:
            mover.drain()
        with torch.no_grad():
            change(net.leaves[place])
            change(twin.leaves[place])
        same(net, twin, streams)
        same(net, twin, streams)
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("place", range(6))
def test_changes_of_staged_units_deeper_in_the_pass(place: int) -> None:
    """A leaf changes another one, whose copy is on its way or queued."""
    for other in range(6):
        net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW), check_placement=False)  # it would mind the write
        for model in (net, twin):
            model.leaves[place].inside = lambda _, model=model, other=other: model.leaves[other].weight.mul_(0.5)
        for _ in range(3):
            same(net, twin, streams)
        finished(mover, streams, net, twin)


# -- cut short ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
@pytest.mark.parametrize("limit", [LEAF_BYTES, ALL])
@pytest.mark.parametrize("place", range(6))
def test_passes_that_are_cut_short(place: int, limit: int, budget: int, error: type[BaseException]) -> None:
    net, twin, mover, streams = staged(limit, budget=budget)

    def stop(leaf: Leaf) -> None:
        raise error

    for then in (lambda: None, mover.drain, lambda: on_thread(mover.drain)):
        net.leaves[place].inside = stop
        with suppress(error):
            call(net, streams)
        then()
        same(net, twin, streams)
        same(net, twin, streams)
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("what", ["drain", "detach", "configure"])
@pytest.mark.parametrize("place", range(6))
def test_others_that_interfere(place: int, what: str) -> None:
    net, twin, mover, streams = staged(LEAF_BYTES)
    other = OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=(place % 4) * LEAF_BYTES + 1)
    action = {"drain": mover.drain, "detach": mover.detach, "configure": lambda: mover.configure(other)}[what]
    net.leaves[place].inside = lambda leaf: on_thread(action)
    for _ in range(4):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_orders_that_jump_drop_what_is_queued() -> None:
    streams = judged()
    net, twin = pair(lambda: Chain(6))
    mover = attached(net, streams, pinned_limit_bytes=LEAF_BYTES)
    for order in ([0, 3, 1, 5], [5, 4, 3, 2, 1, 0], [2], [0, 0, 1, 1], [0, 1, 2, 3, 4, 5]):
        net.order = twin.order = order
        for _ in range(3):
            same(net, twin, streams)
    finished(mover, streams, net, twin)
