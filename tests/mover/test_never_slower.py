"""The mover gives way when sampled steady passes wait longer for copies than stock's moves would take; and only then."""

from __future__ import annotations

import pytest

from lib_async_lowvram import streaming
from lib_async_lowvram.leaf_clock import LeafClock
from lib_async_lowvram.planning import SLOW_PASSES
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, same, simulated

RING = 2 * LEAF_BYTES


@pytest.fixture
def sampled(monkeypatch):
    """Every pass is."""
    monkeypatch.setattr(streaming, "SAMPLED", 1)


def hooks_of(net: Chain) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in net.modules())


def test_slow_passes_in_a_row(sampled, monkeypatch, caplog) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, RING)
    told = []
    mover.on_demote = told.append
    waits = [9.0, 9.0, 0.0, 9.0, 9.0, 9.0]
    monkeypatch.setattr(LeafClock, "read_waits", lambda clock: waits.pop(0) if waits else 0.0)
    passes = 0
    while not mover.demoted:
        same(net, twin, streams)
        passes += 1
        assert passes < 20
    assert not waits  # two slow ones and a fast one did not count
    assert "waited 9000 ms for copies, where stock's moves would take" in mover.demoted
    assert told == [mover.demoted]
    assert mover.status()["state"] == "demoted"
    assert hooks_of(net) == 0
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


def test_the_pass_in_which_residents_arrive_does_not_count(monkeypatch) -> None:
    streams = simulated()
    net, _ = pair()
    monkeypatch.setattr(LeafClock, "read_waits", lambda clock: 9.0)
    mover = attached(net, streams, RING + 2 * LEAF_BYTES)
    for _ in range(SLOW_PASSES + 1):
        call(net, streams)
        call(net, streams)
        mover.drain()
    assert not mover.demoted
    mover.detach()


def test_steady_passes_carry_no_timing_events(monkeypatch) -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING, passes=4)
    timed = []
    record = streams.record
    monkeypatch.setattr(streams, "record", lambda stream, *, timing=False: timed.append(timing) or record(stream, timing=timing))
    for _ in range(3):
        call(net, streams)
    assert sum(timed) == 2 * 3  # a pass's start and end
    timed.clear()
    for _ in range(streaming.SAMPLED):
        call(net, streams)
    assert sum(timed) > 2 * streaming.SAMPLED
    mover.detach()
