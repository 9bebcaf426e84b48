"""`AsyncModelMover` as its users see it: attach, run, look, leave."""

from __future__ import annotations

import copy
import gc
import json
import logging
import threading
import weakref

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.unit_hooks import _OBSERVED, _SPANS, _UNITS
from tests.mover.chains import LEAF_BYTES, Chain, X, attached, call, pair, recorded, same, simulated

STATUS = """version state reason device budget_bytes resident_bytes ring_bytes pinned_bytes pinned_limit_bytes passes hits misses
    refetches write_backs adopted streamed_bytes_per_pass bandwidth_bytes_per_s pass_seconds stall_seconds limit_seconds
    best_schedule_seconds efficiency schedule_efficiency bound last_error networks placement_faults host_waits peak_weight_bytes
    learning_peak_bytes learning_passes""".split()


@pytest.fixture
def streams() -> SimulatedStreams:
    return simulated()


def hooks(module: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (len(part._forward_pre_hooks), len(part._forward_hooks)) for name, part in module.named_modules()}


def test_status_has_every_key_at_every_stage(streams: SimulatedStreams) -> None:
    net, _ = pair()
    mover = AsyncModelMover(OffloadConfig(budget_bytes=1, small_leaf_bytes=0), streams)
    states = []
    for step in range(5):
        status = mover.status()
        json.dumps(status)
        assert not set(STATUS) - set(status), step
        states.append(status["state"])
        if step:
            call(net, streams)
        else:
            mover.attach({"net": net})
    assert states == ["learning"] * 3 + ["active"] * 2
    status = mover.status()
    assert status["reason"] == ""
    assert status["pinned_bytes"] == 6 * LEAF_BYTES
    assert status["efficiency"] == pytest.approx(status["limit_seconds"] / status["pass_seconds"])
    assert status["bound"] in ("copy", "compute")
    assert status["learning_peak_bytes"] == 6 * LEAF_BYTES
    assert status["peak_weight_bytes"] == 2 * LEAF_BYTES
    assert (status["learning_passes"], status["passes"]) == (1, 3)
    mover.detach()


@pytest.mark.parametrize("how", ["detached", "emptied"])
def test_what_a_network_that_is_gone_had_counted_stays_in_the_sums(streams: SimulatedStreams, how: str) -> None:
    """Models are thrown away in the middle of a job; whoever watches the counters must not see them fall."""
    net, _ = pair()
    mover = attached(net, streams, passes=4)
    keys = ("passes", "learning_passes", "hits", "streamed_bytes")
    before = {key: mover.status()[key] for key in keys}
    assert all(before.values())
    if how == "detached":
        mover.detach()
    else:
        mover.drain()
        net.to("meta")
        assert mover.forget_dead() == ["net"]
    status = mover.status()
    assert status["networks"] == {} and status["state"] == "learning"
    assert {key: status[key] for key in keys} == before
    other, _ = pair()
    mover.attach({"net": other})
    for _ in range(4):
        call(other, streams)
    assert {key: mover.status()[key] for key in keys} == {key: 2 * value for key, value in before.items()}
    mover.detach()


def test_a_name_in_use_is_refused(streams: SimulatedStreams) -> None:
    net, other = pair()
    mover = attached(net, streams)
    with pytest.raises(ValueError, match="'net' is attached already"):
        mover.attach({"net": other})
    assert hooks(other) == hooks(Chain())
    mover.detach()


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("part", [lambda net: net, lambda net: net.leaves, lambda net: net.leaves[0], lambda net: nn.Sequential(net)])
def test_what_another_mover_manages_is_refused_and_untouched(streams: SimulatedStreams, part, passes: int) -> None:
    net, twin = pair()
    mover = attached(net, streams, passes=passes)
    before, where = hooks(net), [parameter.data_ptr() for parameter in net.parameters()]
    second = AsyncModelMover(OffloadConfig(), simulated())
    with pytest.raises(ValueError, match="already managed"):
        second.attach({"part": part(net)})
    assert not second.is_attached
    assert hooks(net) == before
    assert [parameter.data_ptr() for parameter in net.parameters()] == where
    same(net, twin, streams)
    mover.detach()
    second.attach({"net": net})  # now it is free
    second.close()


def test_detach_leaves_ordinary_host_tensors_and_no_hooks(streams: SimulatedStreams) -> None:
    net, twin = pair()
    before = hooks(net)
    mover = attached(net, streams)
    assert hooks(net) != before
    mover.detach()
    assert hooks(net) == before
    assert streams.allocated_bytes == mover.status()["pinned_bytes"] == 0
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not streams.is_pinned(mine.data_ptr(), 1)
    assert not mover.is_attached
    mover.detach()
    with pytest.raises(KeyError), mover.running("net"):
        pass


def test_detach_of_one_network_leaves_the_other(streams: SimulatedStreams) -> None:
    one, other = pair()
    mover = AsyncModelMover(OffloadConfig(budget_bytes=1, small_leaf_bytes=0), streams).attach({"one": one, "other": other})
    for _ in range(3):
        call(one, streams)
        call(other, streams)
    mover.detach(["other", "unknown"])
    assert mover.current_network is None
    assert list(mover.status()["networks"]) == ["one"]
    assert hooks(other) == hooks(Chain())
    same(one, other, streams)
    mover.detach()


def test_networks_hand_the_device_over(streams: SimulatedStreams) -> None:
    judged = recorded()
    one, other = pair()
    mover = AsyncModelMover(OffloadConfig(budget_bytes=3 * LEAF_BYTES, small_leaf_bytes=0), judged).attach({"one": one, "other": other})
    heard: list[str | None] = []
    mover.on_network_change = heard.append
    for _ in range(4):
        assert torch.equal(call(one, judged), call(other, judged))
        assert mover.current_network == "other"
        assert judged.allocated_bytes <= 3 * LEAF_BYTES
    mover.drain()
    assert heard == ["one", "other"] * 4 + [None]
    assert mover.status()["peak_weight_bytes"] <= 3 * LEAF_BYTES
    assert mover.status()["passes"] == 6
    judged.check()
    mover.detach()


def test_running_is_one_pass_nested_or_not(streams: SimulatedStreams) -> None:
    net, twin = pair()
    mover = AsyncModelMover(OffloadConfig(budget_bytes=1, small_leaf_bytes=0), streams)
    mover.attach({"net": NetworkSpec([Region(net)], None)})
    for _ in range(3):
        with torch.no_grad(), mover.running("net"):
            with mover.running("net"):
                same(net, twin, streams)
            assert mover.in_pass
            same(net, twin, streams)
        assert not mover.in_pass
    status = mover.status()
    assert (status["learning_passes"], status["passes"]) == (1, 2)
    assert status["hits"] == 24
    with pytest.raises(RuntimeError, match="mine"), mover.running("net"):
        raise RuntimeError("mine")
    assert not mover.in_pass
    assert mover.status()["passes"] == 2
    mover.detach()


def test_the_context_manager_closes_what_it_opened() -> None:
    net, twin = pair()
    with AsyncModelMover(OffloadConfig(budget_bytes=1, small_leaf_bytes=0), "simulated").attach({"net": net}) as mover:
        for _ in range(3):
            same(net, twin, mover.streams)
    with pytest.raises(RuntimeError, match="closed"):
        mover.streams.record(mover.streams.onload_stream)
    assert hooks(net) == hooks(Chain())


def test_streams_given_stay_open(streams: SimulatedStreams) -> None:
    net, _ = pair()
    with attached(net, streams):
        pass
    streams.synchronize(streams.record(streams.onload_stream))


def test_demote_puts_everything_back_and_says_why(streams: SimulatedStreams, caplog: pytest.LogCaptureFixture) -> None:
    net, twin = pair()
    mover = attached(net, streams)
    told: list[str] = []
    mover.on_demote = told.append
    with caplog.at_level(logging.ERROR):
        mover.demote("a reason")
        mover.demote("another")
    assert told == ["a reason"]
    assert hooks(net) == hooks(Chain())
    assert (mover.status()["state"], mover.status()["reason"], mover.status()["last_error"]) == ("demoted", "a reason", "a reason")
    same(net, twin, streams)


def test_configure_counts_from_the_next_pass(streams: SimulatedStreams) -> None:
    net, twin = pair()
    mover = attached(net, streams)
    for leaves in (4, 6, 3, 2):
        mover.configure(OffloadConfig(budget_bytes=leaves * LEAF_BYTES, small_leaf_bytes=0, check_placement=True))
        same(net, twin, streams)
        status = mover.status()
        assert status["ring_bytes"] + status["resident_bytes"] == leaves * LEAF_BYTES
        assert streams.allocated_bytes == leaves * LEAF_BYTES
    mover.detach()


def test_the_pinned_limit_can_change(streams: SimulatedStreams) -> None:
    net, twin = pair()
    mover = attached(net, streams)
    for leaves in (3, 6, 1):
        mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=leaves * LEAF_BYTES))
        same(net, twin, streams)
        same(net, twin, streams)
        status = mover.status()
        pinned = sum(streams.is_pinned(leaf.weight.data_ptr(), LEAF_BYTES) for leaf in net.leaves)
        assert status["pinned_bytes"] == leaves * LEAF_BYTES == pinned * LEAF_BYTES + status["staging_bytes"]
        tier = {3: (1, "staged"), 6: (6, "pinned"), 1: (0, "staged")}[leaves]
        assert (pinned, status["tier"]) == tier
    mover.detach()


def test_a_pass_with_gradients_is_right_and_streaming_goes_on(streams: SimulatedStreams) -> None:
    net, twin = pair()
    mover = attached(net, streams)
    got = net(X)
    assert got.requires_grad
    assert torch.equal(got, twin(X))
    before = mover.status()
    assert (before["passes"], before["learning_passes"]) == (1, 1)
    same(net, twin, streams)
    assert mover.status()["passes"] == 2
    mover.detach()


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES, 1 << 20])
def test_a_copy_of_a_managed_module_is_whole_and_unmanaged(streams: SimulatedStreams, budget: int) -> None:
    net, twin = pair()
    mover = attached(net, streams, budget)
    roles = (len(_SPANS), len(_UNITS), len(_OBSERVED))
    clone = copy.deepcopy(net)
    assert (len(_SPANS), len(_UNITS), len(_OBSERVED)) == roles
    before = mover.status()["hits"]
    with torch.no_grad():
        assert torch.equal(clone(X), twin(X))
        clone.leaves[0].weight.zero_()
    assert mover.status()["hits"] == before
    same(net, twin, streams)
    mover.detach()


def test_a_dropped_model_is_forgotten_and_everything_given_back() -> None:
    streams = simulated()
    other, net = pair()
    mover = attached(net, streams, 4 * LEAF_BYTES)
    mover.attach({"other": other})
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    call(other, streams)
    assert list(mover.status()["networks"]) == ["other"]
    mover.drain()
    gc.collect()
    assert streams.allocated_bytes == 0
    assert mover.status()["pinned_bytes"] == mover.status()["host_bytes"] == 6 * LEAF_BYTES
    mover.detach()
    assert mover.forget_dead() == []


def test_a_closed_mover_leaves_nothing_but_the_model() -> None:
    threads = set(threading.enumerate())
    net, twin = pair()
    mover = AsyncModelMover(OffloadConfig(budget_bytes=1, small_leaf_bytes=0), "simulated").attach({"net": net})
    for _ in range(3):
        same(net, twin, mover.streams)
    assert set(threading.enumerate()) != threads
    mover.close()
    assert set(threading.enumerate()) == threads
    gone = weakref.ref(mover)
    del mover
    gc.collect()
    assert gone() is None
    same(net, twin, simulated())


def test_a_model_that_was_detached_does_not_keep_the_device():
    """Its masters live on as ordinary memory; they keep neither the streams nor their threads."""
    net, _ = pair()
    streams = SimulatedStreams(capacity_bytes=64 * LEAF_BYTES)
    mover = attached(net, streams)
    call(net, streams)
    mover.detach()
    gone = weakref.ref(streams)
    del mover, streams
    gc.collect()
    assert gone() is None
