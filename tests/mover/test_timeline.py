"""The timeline of a pass: units, bytes and lanes as they were, times in order; asked for, not carried by steady passes."""

from __future__ import annotations

import pytest

from lib_async_lowvram import timeline
from lib_async_lowvram.planning import Planning
from tests.mover.chains import LEAF_BYTES, attached, call, pair, simulated

RING = 2 * LEAF_BYTES


@pytest.fixture
def every_wait(monkeypatch):
    """A stall is one however short."""
    monkeypatch.setattr(timeline, "LEAST_STALL_SECONDS", -1.0)


def looked_at(mover, net, streams) -> dict:
    mover.timeline()
    call(net, streams)
    call(net, streams)
    return mover.timeline()


def lane(seen: dict, name: str) -> list[dict]:
    return [span for span in seen["spans"] if span["lane"] == name]


def test_a_pass_that_streams_everything(every_wait) -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING)
    seen = looked_at(mover, net, streams)
    leaves = [f"leaves.{place}" for place in range(6)]
    assert seen["network"] == "net" and seen["age_seconds"] >= 0
    assert [span["name"] for span in lane(seen, "compute")] == leaves
    assert [span["name"] for span in lane(seen, "stall")] == leaves
    assert sorted(span["name"] for span in lane(seen, "copy")) == leaves  # small ones, too: somebody looks
    assert {span["bytes"] for span in lane(seen, "copy")} == {LEAF_BYTES}
    for waits, computes in zip(lane(seen, "stall"), lane(seen, "compute"), strict=True):
        assert 0 <= waits["start"] <= waits["end"] == computes["start"] <= computes["end"] <= seen["seconds"]
    copies = lane(seen, "copy")
    assert all(copy["start"] < copy["end"] for copy in copies)
    assert all(one["end"] <= other["start"] for one, other in zip(copies, copies[1:], strict=False))  # one link
    worst = max(lane(seen, "stall"), key=lambda span: span["end"] - span["start"])
    assert mover.status()["worst_stall"] == {"unit": f"net.{worst['name']}", "seconds": worst["end"] - worst["start"]}
    mover.detach()


def test_residents_are_in_the_computing_of_the_unit_before_them(every_wait, monkeypatch) -> None:
    monkeypatch.setattr(Planning, "better", lambda *args: None)  # the set stays what it is, whatever was measured
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING + 3 * LEAF_BYTES)
    call(net, streams)
    seen = looked_at(mover, net, streams)
    streamed = [unit.name for unit in mover._networks["net"].contents.units if not unit.resident]
    assert [span["name"] for span in lane(seen, "compute")] == streamed and len(streamed) == 3
    assert sum(span["bytes"] for span in lane(seen, "copy")) == 3 * LEAF_BYTES
    mover.detach()


def test_steady_passes_carry_no_timing_events_unless_asked(monkeypatch) -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING, passes=4)
    timed = []
    record = type(streams).record

    def counting(self, stream, *, timing=False):
        timed.append(timing)
        return record(self, stream, timing=timing)

    monkeypatch.setattr(type(streams), "record", counting)
    call(net, streams)
    steady = sum(timed)
    assert steady == 2  # the pass's own start and end
    mover.timeline()
    timed.clear()
    call(net, streams)
    assert sum(timed) > 2 + 2 * 6
    timed.clear()
    call(net, streams)
    assert sum(timed) == 2  # asked once, timed once
    mover.detach()


def test_nothing_yet() -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING, passes=0)
    assert mover.timeline() == {"network": None, "seconds": 0.0, "age_seconds": None, "spans": []}
    assert mover.status()["worst_stall"] is None
    mover.detach()


def test_frames_of_previews_beside_it() -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING, passes=3)
    mover.timeline()
    start = streams.record(streams.current_stream(), timing=True)
    call(net, streams)
    end = streams.record(streams.current_stream(), timing=True)
    call(net, streams)
    later = streams.record(streams.current_stream(), timing=True)
    seen = mover.timeline([(start, end), (end, later)])
    (frame,) = lane(seen, "preview")  # the second frame began after the pass
    assert frame["start"] < 0 and frame["end"] > seen["seconds"]
    mover.detach()
