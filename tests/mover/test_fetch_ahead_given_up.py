"""What was fetched ahead is given up: whoever else takes the device, wants it or needs the room; in flight, too."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram.pinning import in_flight
from tests.mover.ahead_rig import (
    CASES,
    FIRST,
    ROOMY,
    SECOND,
    Rig,
    grow,
    write,
)
from tests.mover.chains import LEAF_BYTES, Leaf, recorded


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("slow", [False, True])
def test_given_up(case: str, slow: bool) -> None:
    streams = recorded(**({"bandwidth": 3e6} if slow else {}))
    rig = Rig(streams, count=3)
    rig.fetched()
    assert SECOND * LEAF_BYTES in {copy.memory.numel() * SECOND for copy in rig.mover._networks["two"].kept._held.values()}
    CASES[case](rig)
    for name, network in rig.mover._networks.items():
        assert not network.kept._held, name
    assert streams.allocated_bytes <= 3 * LEAF_BYTES
    rig.finish(active=case != "fault")


def test_demoted_or_closed_gives_it_up() -> None:
    for end in (lambda mover: mover.demote("slow"), lambda mover: mover.close()):
        rig = Rig(recorded())
        rig.fetched()
        end(rig.mover)
        assert rig.streams.allocated_bytes == 0
        rig.streams.check()


def test_a_model_that_is_gone_is_forgotten_with_what_was_fetched_for_it() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.nets["two"].to("meta")
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.detach()
    rig.streams.check()


def test_nothing_of_a_detached_network_is_remembered() -> None:
    rig = Rig(recorded())
    rig.run("one")
    two = rig.mover._networks["two"]
    seen = []

    def detach(_: Leaf) -> None:
        rig.mover.detach(["two"])  # memory is taken already, and nothing is copied yet
        seen.append(rig.streams.allocated_bytes)

    rig.nets["one"].leaves[0].inside = detach
    rig.fetched(passes=1)
    assert seen == [FIRST * LEAF_BYTES] and not rig.mover._context.ahead.concerns(two)
    rig.mover.attach({"two": rig.nets["two"]})
    rig.finish()


def test_the_network_in_use_grows() -> None:
    """Somebody puts a larger weight there: no room is left for others."""
    rig = Rig(recorded(), budget=(FIRST + SECOND) * LEAF_BYTES)
    assert rig.fetched() == SECOND * LEAF_BYTES
    rig.both(grow, "one")
    rig.run("one")
    assert not rig.mover._networks["two"].kept._held
    assert rig.fetched() == (SECOND - 1) * LEAF_BYTES + LEAF_BYTES
    assert rig.mover.status()["peak_weight_bytes"] <= (FIRST + SECOND) * LEAF_BYTES
    rig.finish()


def test_the_network_in_use_is_entered_anew() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.mover._networks["one"].contents.resized = True
    held = []
    rig.nets["one"].leaves[0].inside = lambda _: held.append(rig.streams.allocated_bytes)
    rig.run("one")
    assert held == [FIRST * LEAF_BYTES]
    rig.finish()


def test_the_wish_is_over_with_the_pass_it_was_for() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.run("two")
    rig.run("one")
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.expect("two")
    rig.mover.drain()  # nor is it kept until somebody comes back
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.finish()


def test_expected_but_another_was_expected_before() -> None:
    rig = Rig(recorded(), count=3)
    rig.fetched()
    rig.mover.expect("three")
    rig.run("one")
    assert rig.streams.allocated_bytes == (FIRST + 3) * LEAF_BYTES
    rig.run("three")
    assert rig.counted("adopted_ahead_bytes", "three") == 3 * LEAF_BYTES
    rig.finish()


def test_another_plan_has_the_room_first() -> None:
    """The network in use takes up a larger plan in the middle of a job."""
    rig = Rig(recorded(), budget=ROOMY)
    rig.fetched()
    one = rig.mover._networks["one"]
    plan = one.plan
    one.planning.better = lambda *_: plan
    held = []
    one.streaming._changeover.to = lambda plan: held.append(rig.streams.allocated_bytes)
    rig.run("one")
    assert held == [FIRST * LEAF_BYTES]
    del one.planning.better
    rig.finish()


def test_given_up_in_flight_and_detached_the_masters_wait_for_the_copies() -> None:
    rig = Rig(recorded(bandwidth=3e6))
    rig.fetched()
    rig.mover._context.ahead.give_up()  # as where the network in use wants the room
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.detach(["two"])
    rig.streams.check()
    rig.mover.attach({"two": rig.nets["two"]})
    rig.finish()


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("staging", [False, True])
def test_entered_and_left_at_once_while_copies_are_under_way(staging: bool, changed: bool) -> None:
    """Those that were fetched, and with `changed` one of its own among them."""
    rig = Rig(recorded(bandwidth=3e6), **({"pinned_limit_bytes": 3 * LEAF_BYTES} if staging else {}))
    rig.fetched()
    if changed:
        rig.both(write)
    with torch.no_grad():
        rig.mover.prepare("two")
    assert rig.counted("adopted_ahead_bytes") > 0
    rig.mover.drain()
    assert rig.streams.allocated_bytes == 0
    rig.streams.check()
    rig.finish()


@pytest.mark.parametrize("staging", [False, True])
def test_drained_nothing_is_in_flight(staging: bool) -> None:
    rig = Rig(recorded(bandwidth=3e6), **({"pinned_limit_bytes": 3 * LEAF_BYTES} if staging else {}))
    rig.fetched()
    units = rig.mover._networks["two"].contents.units
    assert any(unit.copied is not None for unit in units)
    rig.mover.drain()
    assert not any(in_flight(unit) for unit in units)
    rig.finish()
