"""The next network's first weights travel while another one computes: in order, within the budget, and given up where they must be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lib_async_lowvram import NetworkSpec, Region
from tests.mover.ahead_rig import FIRST, ROOMY, SECOND, Rig, Waiting
from tests.mover.chains import LEAF_BYTES, Leaf, call, handed_over, judged, recorded, simulated


# -- while another one computes ----------------------------------------------------------------------------------------
def test_copies_are_under_way_before_anybody_waits_and_arrive_once() -> None:
    streams = simulated(Waiting)
    rig = Rig(streams)
    rig.run("one")
    before = rig.counted("streamed_bytes")
    with streams.hold_copies("onload") as hold:
        streams.hold = hold
        assert rig.fetched(passes=1) == SECOND * LEAF_BYTES  # its pass has ended, and nobody has waited for anything
        assert rig.counted("fetched_ahead_bytes") == SECOND * LEAF_BYTES
        with torch.no_grad():
            rig.mover.drain(for_network="two")
        assert rig.mover.current_network is None and streams.allocated_bytes == SECOND * LEAF_BYTES
        assert streams.waited == 0  # leaving "one" waits for its own copies, not for those behind them
        hold.let_pass(1 << 30)
        rig.run("two")
        streams.hold = None
    assert rig.counted("streamed_bytes") - before == SECOND * LEAF_BYTES  # each weight once
    assert rig.counted("adopted_ahead_bytes") == SECOND * LEAF_BYTES
    rig.finish()


def test_the_next_one_finds_its_weights_there_under_the_judge() -> None:
    rig = Rig(recorded())
    for _ in range(3):
        assert rig.fetched() == SECOND * LEAF_BYTES
        rig.run("two")
        rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == rig.counted("fetched_ahead_bytes") == 3 * SECOND * LEAF_BYTES
    rig.finish()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_jittery_and_poisoned_and_taken_over_by_another_thread(elsewhere: bool) -> None:
    streams = recorded(bandwidth=2e8, latency=1e-5, jitter_seconds=2e-4, seed=4, poison=True)
    rig = Rig(streams)
    for _ in range(3):
        assert rig.fetched() == SECOND * LEAF_BYTES
        handed_over(lambda: rig.run("two"), streams) if elsewhere else rig.run("two")
    rig.finish()


def test_the_network_in_use_is_not_delayed_by_what_it_has_fetched() -> None:
    """Its own copies come first: what streams in its next pass was enqueued already, or follows; leaving waits for those alone."""
    rig = Rig(recorded(), budget=ROOMY)
    order = []
    real = rig.streams.copy

    def copy(destination: torch.Tensor, source: torch.Tensor, stream: object) -> None:
        order.append(destination.numel())
        real(destination, source, stream)

    rig.streams.copy = copy
    rig.run("one")
    own = len(order)
    assert own == FIRST
    rig.mover.expect("two")
    rig.run("one")
    assert len(order) == own + SECOND
    rig.finish()


def test_memory_is_taken_as_the_pass_begins_and_copies_are_enqueued_as_it_ends() -> None:
    rig = Rig(recorded())
    rig.run("one")
    seen = {}

    def look(_: Leaf) -> None:
        seen["held"] = rig.streams.allocated_bytes
        seen["copies"] = rig.inner.onload_stream.copies

    rig.nets["one"].leaves[0].inside = look
    before = rig.inner.onload_stream.copies
    rig.fetched(passes=1)
    assert seen == {"held": (FIRST + SECOND) * LEAF_BYTES, "copies": before}
    rig.finish()


@pytest.mark.parametrize("same_plan", [1e7], indirect=True)  # a slow link, so that what can be resident is
def test_one_that_streams_in_part_is_fetched_in_part(same_plan: None) -> None:
    rig = Rig(recorded(), budget=4 * LEAF_BYTES)
    assert rig.counted("resident_bytes") == 2 * LEAF_BYTES
    held = rig.fetched()
    assert held == 2 * LEAF_BYTES
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == held
    rig.finish()


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 6, 7, 9])
def test_both_together_keep_to_the_budget(budget: int) -> None:
    rig = Rig(simulated(), budget=budget * LEAF_BYTES)
    rig.mover.status()
    for _ in range(2):
        rig.fetched()
        rig.run("two")
        rig.run("two")
    least = 2 * LEAF_BYTES
    assert rig.mover.status()["peak_weight_bytes"] <= max(least, budget * LEAF_BYTES)
    assert (rig.counted("adopted_ahead_bytes") > 0) == (budget > FIRST)
    rig.finish()


def test_an_automatic_budget_has_room_beside_what_is_held() -> None:
    streams = simulated(capacity_bytes=256 << 20)
    rig = Rig(streams, budget=0, reserve_bytes=64 << 20)
    assert rig.fetched() == SECOND * LEAF_BYTES
    hog = streams.allocate(streams.free_memory())  # another program
    rig.run("one")
    assert streams.allocated_bytes - hog.numel() == FIRST * LEAF_BYTES
    streams.free(hog)
    rig.finish()


def test_an_open_ended_network_is_followed_from_its_second_pass() -> None:
    """SD2's text encoder: nobody says that its pass is over; the next one says it of the one before."""
    streams = recorded()
    rig = Rig(streams, warm=False)
    rig.mover.detach(["one"])
    first = rig.nets["one"]
    rig.mover.attach({"one": NetworkSpec([Region(first, trigger=first.leaves[0])], span=first.leaves[0], open_ended=True)})
    for _ in range(3):
        for name in rig.names:
            rig.run(name)
    rig.mover.expect("two")
    rig.run("one")
    assert streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.expect("two")
    rig.run("one")
    assert streams.allocated_bytes == (FIRST + SECOND) * LEAF_BYTES
    rig.mover.drain(for_network="two")
    assert rig.mover.current_network is None and streams.allocated_bytes == SECOND * LEAF_BYTES
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == SECOND * LEAF_BYTES
    rig.finish()


# -- nothing is fetched ------------------------------------------------------------------------------------------------
def test_nothing_before_it_has_learned_or_for_one_that_is_in_use_or_unknown() -> None:
    streams = recorded()
    rig = Rig(streams, warm=False)
    rig.run("one")
    rig.run("one")
    assert rig.fetched() == 0
    for name in ("one", "nobody"):
        rig.mover.expect(name)
        rig.run("one")
        assert streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.finish()


def test_nothing_after_a_pass_that_was_cut_short() -> None:
    rig = Rig(recorded())
    rig.run("one")

    def fail(_: Leaf) -> None:
        raise KeyboardInterrupt

    rig.nets["one"].leaves[1].inside = fail
    rig.mover.expect("two")
    with pytest.raises(KeyboardInterrupt):
        call(rig.nets["one"], rig.streams)
    rig.run("one")  # this is when the interrupt is noticed
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES  # asked once, for that pass
    rig.nets["one"].leaves[1].inside = fail
    rig.mover.expect("two")
    with pytest.raises(KeyboardInterrupt):
        call(rig.nets["one"], rig.streams)
    assert rig.streams.allocated_bytes == (FIRST + SECOND) * LEAF_BYTES  # taken as the pass began; it is still open
    rig.run("two")
    assert rig.streams.allocated_bytes == SECOND * LEAF_BYTES
    rig.finish()


def test_nothing_where_changes_leave_no_trace_or_masters_are_not_pinned_and_there_is_no_ring() -> None:
    rig = Rig(recorded(), always_write_back=True)
    rig.fetched()
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()
    rig = Rig(recorded(pinning="none"))
    rig.fetched()
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()


def test_nothing_after_a_pass_with_gradients() -> None:
    rig = Rig(recorded())
    rig.mover.expect("two")
    with judged(rig.streams), torch.enable_grad():
        rig.nets["one"](torch.ones(1, 8))
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()


def test_nothing_after_a_learning_pass() -> None:
    rig = Rig(recorded())
    rig.mover.detach(["one"])
    rig.mover.attach({"one": rig.nets["one"]})
    rig.mover.expect("two")
    rig.run("one")
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()


@pytest.mark.parametrize("how", ["modules", "plan"])
def test_nothing_for_one_that_will_learn_or_plan_anew(how: str) -> None:
    rig = Rig(recorded())
    rig.run("one")
    if how == "modules":
        rig.both(lambda net: setattr(net.leaves[1], "inner", nn.LayerNorm(2)))
    else:
        rig.mover.configure(dataclasses.replace(rig.mover.config, budget_bytes=ROOMY // 2))
        rig.run("one")
    assert rig.fetched() == 0
    rig.finish()


def test_nothing_where_memory_was_found_to_be_short() -> None:
    rig = Rig(recorded())
    rig.run("one")
    rig.mover._networks["one"].planning.most_bytes = ROOMY // 2  # as `shed` leaves it
    assert rig.fetched(passes=1) == 0
    rig.finish()


def test_memory_runs_out_quietly() -> None:
    streams = simulated(capacity_bytes=(FIRST + SECOND) * LEAF_BYTES)
    rig = Rig(streams)
    hog = streams.allocate(2 * LEAF_BYTES)
    rig.run("one")
    rig.mover.expect("two")
    rig.run("one")
    assert rig.counted("fetched_ahead_bytes") == (SECOND - 2) * LEAF_BYTES
    assert not rig.mover.last_error
    streams.free(hog)
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == (SECOND - 2) * LEAF_BYTES
    rig.finish()
