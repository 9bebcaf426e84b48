"""Host memory tiers: what may not be pinned travels through the staging ring, with the same pixels, and the limit holds exactly."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch

from lib_async_lowvram import OffloadConfig
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from tests.mover.chains import LEAF_BYTES, X, attached, call, pair, same, simulated
from tests.mover.staging_rig import ALL, SLOW, finished, judged, staged, staging_threads
from tests.mover.zoo import EVERYTHING, MIXED, Rig, Zoo

pytestmark = pytest.mark.usefixtures("the_limit_holds")


# -- the same pixels ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES, EVERYTHING])
@pytest.mark.parametrize("limit", [1, 1023, 1024, 4096, LEAF_BYTES, LEAF_BYTES + 1, *range(2 * LEAF_BYTES, ALL + 1, LEAF_BYTES // 2)])
def test_the_same_bits_under_every_limit(limit: int, budget: int) -> None:
    net, twin, mover, streams = staged(limit, budget=budget)
    mover.drain()  # or what is kept from the learning pass is never copied again
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    expected = "pinned" if limit >= ALL else "staged" if limit >= 1024 else "pageable"
    assert status["tier"] == expected
    assert status["pinned_bytes"] <= limit
    assert (status["staging_bytes"] > 0) == (expected == "staged")
    assert status["staging_bytes"] <= 2 * LEAF_BYTES
    assert (status["unpinned_bytes"] > 0) == (limit < ALL)
    assert status["unpinned_units"] * LEAF_BYTES == status["unpinned_bytes"]
    assert status["pinned_bytes"] == status["staging_bytes"] + ALL - status["unpinned_bytes"]
    assert (status["staged_bytes"] > 0) == (expected == "staged")
    assert (status["host_waits"] > 0) == (expected == "pageable" and budget < EVERYTHING)  # I3, but for the last tier
    mover.drain()
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("budget", [1, MIXED, EVERYTHING])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_the_zoo_under_every_limit(share: float, budget: int) -> None:
    streams = judged()
    weights = sum(p.numel() * p.element_size() for p in Zoo().parameters())
    rig = Rig(streams, budget, passes=0)
    limit = max(1, int(share * weights))
    rig.mover.configure(OffloadConfig(budget_bytes=budget, small_leaf_bytes=0, check_placement=True, pinned_limit_bytes=limit))
    rig.passes(3)
    rig.both(lambda net: net.blocks[1].wide.weight.data.mul_(0.5))
    rig.mover.mark_dirty(rig.net.blocks[1].wide)
    rig.passes(2)
    rig.mover.drain()
    rig.passes(2)
    rig.mover.detach()
    rig.same_weights()
    streams.check()


def test_the_ring_is_kept_back_when_not_everything_can_be_pinned() -> None:
    """Or masters would be pinned at first only to give way when the network is entered."""
    net, twin, mover, streams = staged(3 * LEAF_BYTES, passes=0)
    assert mover.status()["pinned_bytes"] == LEAF_BYTES
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["pinned_bytes"] == 3 * LEAF_BYTES
    finished(mover, streams, net, twin)


def test_the_ring_takes_pieces_of_units_that_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin, mover, streams = staged(3000)
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["staging_bytes"] == 2 * 1024
    finished(mover, streams, net, twin)


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [ALL, 3 * LEAF_BYTES + 512])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("number", range(1, 9))
def test_pinning_refused_at_any_point(number: int, once: bool, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    asked = [0]

    def pinning(address: int, nbytes: int) -> bool:
        asked[0] += 1
        return asked[0] != number if once else asked[0] < number

    with caplog.at_level(logging.WARNING, "async_lowvram"):
        net, twin, mover, streams = staged(limit, judged(pinning=pinning))
        for _ in range(3):
            same(net, twin, streams)
    status = mover.status()
    refused = mover.host.refusals
    assert len([record for record in caplog.records if "pinned memory refused" in record.message]) == min(1, refused)
    assert (status["tier"] == "pinned") == (status["unpinned_units"] == 0)
    if not once and number == 1:
        assert status["tier"] == "pageable" and status["pinned_bytes"] == 0 and status["host_waits"] > 0
    elif not once and refused:
        assert status["tier"] in ("staged", "pageable")
    elif refused:
        assert status["tier"] in ("pinned", "staged") and status["host_waits"] == 0  # masters are tried again after learning
    finished(mover, streams, net, twin)


def test_masters_give_way_to_the_ring_where_the_device_has_no_more() -> None:
    """As under WSL: the driver refuses long before the limit."""
    pinned: dict[int, int] = {}

    class Narrow(SimulatedStreams):
        def pin(self, address: int, nbytes: int) -> bool:
            fits = sum(pinned.values()) + nbytes <= 3 * LEAF_BYTES
            if fits and super().pin(address, nbytes):
                pinned[address] = nbytes
                return True
            return False

        def unpin(self, address: int) -> None:
            pinned.pop(address, None)
            super().unpin(address)

    net, twin, mover, streams = staged(EVERYTHING, RecordingStreams(simulated(Narrow, **SLOW)))
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    assert (status["tier"], status["staging_bytes"], status["pinned_bytes"]) == ("staged", 2 * LEAF_BYTES, 3 * LEAF_BYTES)
    assert status["host_waits"] == 0
    finished(mover, streams, net, twin)


# -- several networks, limits that change ------------------------------------------------------------------------------
def test_several_networks_under_one_limit(the_limit_holds: list[int]) -> None:
    """The first has everything pinned, and gives way to the ring that the second one needs."""
    streams = judged()
    nets = [pair() for _ in range(3)]
    mover = attached(nets[0][0], streams, pinned_limit_bytes=ALL)
    assert mover.status()["tier"] == "pinned"
    mover.attach({"second": nets[1][0], "third": nets[2][0]})
    for _ in range(3):
        for net, twin in nets:
            same(net, twin, streams)
            same(net, twin, streams)
    status = mover.status()
    assert (status["tier"], status["host_waits"], status["pinned_bytes"]) == ("staged", 0, ALL)
    assert status["staging_bytes"] == 2 * LEAF_BYTES
    mover.detach(["second", "third"])
    same(*nets[0], streams)
    assert mover.status()["tier"] == "staged"  # what gave way stays so until masters are pinned anew
    mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=ALL + 1))
    same(*nets[0], streams)
    assert mover.status()["tier"] == "pinned" and not staging_threads()
    assert max(the_limit_holds) == ALL
    finished(mover, streams, *nets[0])


def test_masters_give_way_to_a_ring_of_full_size() -> None:
    """Not only where there is no room at all for one."""
    streams = judged()
    (net, twin), (other, its_twin) = pair(), pair()
    mover = attached(net, streams, pinned_limit_bytes=ALL + 1024)
    mover.attach({"other": other})
    for _ in range(3):
        same(other, its_twin, streams)
        same(net, twin, streams)
    assert mover.status()["staging_bytes"] == 2 * LEAF_BYTES
    finished(mover, streams, net, twin)


def test_the_limit_changes_in_the_middle(the_limit_holds: list[int]) -> None:
    net, twin, mover, streams = staged(ALL)
    for limit in (LEAF_BYTES, ALL, 1, 3 * LEAF_BYTES, 2000, 0):
        mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, check_placement=True, pinned_limit_bytes=limit))
        same(net, twin, streams)
        assert mover.status()["pinned_bytes"] <= (limit or ALL)
        same(net, twin, streams)
    finished(mover, streams, net, twin)


# -- life --------------------------------------------------------------------------------------------------------------
def test_threads_come_and_go() -> None:
    net, twin, mover, streams = staged(ALL)
    assert not staging_threads()
    mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=LEAF_BYTES))
    for _ in range(3):
        same(net, twin, streams)
        assert len(staging_threads()) == 1
        mover.drain()
    mover.close()
    assert not staging_threads()
    assert mover.host.pinned_bytes == 0


def test_a_dropped_mover_ends_its_thread() -> None:
    net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW), check_placement=False)
    same(net, twin, streams)
    thread, gone = staging_threads()[0], weakref.ref(mover)
    del mover, net  # hooks keep a mover for as long as a model has them
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_a_dropped_model_is_not_kept_by_what_is_queued() -> None:
    streams = simulated()
    other, net = pair()
    mover = attached(net, streams, pinned_limit_bytes=LEAF_BYTES)
    mover.attach({"other": other})
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    call(other, streams)
    assert list(mover.status()["networks"]) == ["other"]
    mover.drain()
    gc.collect()
    assert mover.status()["host_bytes"] == ALL + mover.status()["staging_bytes"]
    mover.detach()


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
def test_a_copy_of_a_model_is_whole_and_unmanaged(budget: int) -> None:
    net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW), budget=budget)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(clone(X), twin(X))
    same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_nothing_of_it_where_everything_is_pinned() -> None:
    net, twin, mover, streams = staged(0)
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    assert (status["tier"], status["staging_bytes"], status["staged_bytes"], status["staging_waits"]) == ("pinned", 0, 0, 0)
    assert not staging_threads()
    finished(mover, streams, net, twin)
