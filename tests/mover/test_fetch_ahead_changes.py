"""Fetched ahead and changed meanwhile; through the staging ring and from a file; and errors on the way."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_async_lowvram.ahead import Ahead
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.staging import Staged
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.device.weight_file import FileMaster
from tests.mover.ahead_rig import (
    CASES,
    FIRST,
    ROOMY,
    SECOND,
    Rig,
    add_a_bias,
    grow,
    load,
    replace,
    shrink,
    write,
)
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, recorded, simulated
from tests.mover.test_failed_copies import BUS, failing
from tests.mover.trees import put_in_file


# -- out of date -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("change", [write, replace, shrink, grow, add_a_bias, load])
def test_changed_on_the_host_meanwhile(change: Callable[[Chain], None], slow: bool, masters: bool) -> None:
    """`masters`: somebody asks for them before the network is entered, so that the change is old news by then."""
    streams = recorded(**({"bandwidth": 3e6} if slow else {}))
    rig = Rig(streams)
    rig.fetched()
    rig.both(change)
    if masters:
        rig.mover.masters(["two"])
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") < SECOND * LEAF_BYTES
    rig.run("two")
    rig.finish()


def test_changed_before_it_is_fetched() -> None:
    """What is fetched is the new truth."""
    rig = Rig(recorded())
    rig.run("one")
    rig.both(write)
    rig.fetched(passes=1)
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == SECOND * LEAF_BYTES
    rig.finish()


def test_changed_without_a_trace_and_told() -> None:
    rig = Rig(recorded())
    rig.fetched()
    for net in (rig.nets["two"], rig.twins["two"]):
        net.leaves[2].weight.data.mul_(0.5)
    rig.mover.mark_dirty(rig.nets["two"].leaves[2])
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == (SECOND - 1) * LEAF_BYTES
    rig.finish()


def test_changed_between_the_reservation_and_the_copy() -> None:
    rig = Rig(recorded())
    rig.run("one")
    changes = iter((grow, write, replace))

    def change(_: Leaf) -> None:
        with rig.mover._context.checker.suspended():
            rig.both(next(changes))

    for _ in range(3):
        rig.nets["one"].leaves[1].inside = change
        rig.fetched(passes=1)
        rig.run("two")
    rig.finish()


def test_modules_changed_meanwhile() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.both(lambda net: setattr(net.leaves[1], "inner", nn.LayerNorm(2)))
    rig.run("two")
    rig.finish()


def test_the_plan_changed_meanwhile() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.mover.configure(dataclasses.replace(rig.mover.config, budget_bytes=4 * LEAF_BYTES))
    rig.mover.status()
    rig.run("two")
    assert rig.streams.allocated_bytes <= 4 * LEAF_BYTES
    rig.finish()


# -- masters that are not pinned, or in a file ---------------------------------------------------------------------------
def staged(streams: Streams, budget: int = ROOMY) -> Rig:
    """No master is pinned; there is a ring."""
    rig = Rig(streams, budget, pinned_limit_bytes=3 * LEAF_BYTES)
    assert rig.mover.status()["staging_bytes"] > 0
    return rig


@pytest.mark.parametrize("slow", [False, True])
def test_through_the_staging_ring(slow: bool) -> None:
    streams = recorded(**({"bandwidth": 3e6} if slow else {}))
    rig = staged(streams)
    for _ in range(2):
        rig.fetched()
        rig.run("two")
    assert rig.counted("fetched_ahead_bytes") == 2 * SECOND * LEAF_BYTES
    assert rig.counted("adopted_ahead_bytes") > 0 and rig.counted("staged_bytes") > 0
    rig.finish()


@pytest.mark.parametrize("case", ["another network", "drain", "gradients", "error", "shed", "another limit"])
def test_given_up_in_the_staging_ring(case: str) -> None:
    streams = recorded(bandwidth=3e6)
    rig = Rig(streams, count=3, pinned_limit_bytes=3 * LEAF_BYTES)
    assert rig.fetched() > 0
    CASES[case](rig)
    assert not rig.mover._networks["two"].kept._held
    rig.finish()


@pytest.mark.parametrize("change", [None, write, replace, grow])
def test_from_a_file(tmp_path: Path, change: Callable[[Chain], None] | None) -> None:
    streams = recorded()
    rig = Rig(streams, warm=False)
    rig.mover.detach(["two"])
    file = put_in_file(rig.nets["two"], tmp_path / "weights")
    rig.mover.host.files.append(file)
    rig.mover.attach({"two": rig.nets["two"]})
    for _ in range(3):
        for name in rig.names:
            rig.run(name)
    for _ in range(2):
        rig.fetched()
        if change is not None:
            rig.both(change)
        rig.run("two")
    assert rig.counted("fetched_ahead_bytes") > 0
    rig.run("one")
    in_file = [unit.in_file is not None for unit in rig.mover._networks["two"].contents.units]
    rig.both(lambda net: net.leaves[3].weight.mul_(0.5))
    rig.fetched(passes=1)  # what was changed is not packed at the end of another network's pass
    assert [unit.in_file is not None for unit in rig.mover._networks["two"].contents.units] == in_file
    rig.finish()
    file.close()


def test_a_read_that_failed_is_tried_again_when_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(recorded(), warm=False)
    rig.mover.detach(["two"])
    file = put_in_file(rig.nets["two"], tmp_path / "weights")
    rig.mover.host.files.append(file)
    rig.mover.attach({"two": rig.nets["two"]})
    for _ in range(3):
        for name in rig.names:
            rig.run(name)
    rig.run("one")
    real, failed = FileMaster.read, []

    def read(master: FileMaster, into: torch.Tensor, start: int) -> None:
        if not failed:
            failed.append(True)
            raise OSError(BUS)
        real(master, into, start)

    monkeypatch.setattr(FileMaster, "read", read)
    assert rig.fetched(passes=1) > 0
    wait_for_the_thread(rig)
    rig.run("two")
    assert failed and not rig.mover.last_error
    assert 0 < rig.counted("adopted_ahead_bytes") < SECOND * LEAF_BYTES
    rig.finish()
    file.close()


def wait_for_the_thread(rig: Rig) -> None:
    for copy in rig.mover._networks["two"].kept._held.values():
        if isinstance(copy.used, Staged):
            with contextlib.suppress(OSError):
                copy.used.event()


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(SECOND))
@pytest.mark.parametrize("then", ["two", "one", "drain"])
def test_a_copy_that_fails(number: int, then: str) -> None:
    device = simulated()
    streams = RecordingStreams(device)
    rig = Rig(streams)
    rig.run("one")
    rig.mover.expect("two")
    failing(device, "onload", number)
    try:
        rig.run("one")
        rig.mover.drain() if then == "drain" else rig.run(then)
    except RuntimeError as error:
        assert str(error) == BUS
    device.onload_stream.link.fail_copy = None
    for name in ("one", "two", "one"):
        try:
            rig.run(name)
        except RuntimeError as error:
            assert str(error) == BUS
    assert not rig.mover.demoted
    rig.finish()


def test_an_error_of_the_device_while_it_is_fetched_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(recorded())
    rig.run("one")
    real = rig.streams.copy

    def copy(*_: object) -> None:
        raise RuntimeError(BUS)

    rig.streams.copy = copy
    assert rig.fetched(passes=1) == 0
    rig.streams.copy = real
    assert not rig.mover.demoted
    rig.finish()


def test_a_fault_of_ours_while_it_is_fetched_makes_way_for_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(recorded())
    rig.run("one")

    def wrong(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Ahead, "_fetch", wrong)
    assert rig.fetched(passes=1) == 0
    rig.run("one")
    assert "fault of this extension" in rig.mover.demoted
    rig.run("two")
    assert rig.streams.allocated_bytes == 0
    rig.streams.check()


def test_an_interrupt_while_it_is_fetched_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(recorded())
    rig.run("one")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ahead, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rig.fetched(passes=1)
    monkeypatch.undo()
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.finish()
