"""A fault of ours, anywhere in the mover: the picture is the same, stock takes over at the pass's end, and nothing stays behind."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, Region
from lib_async_lowvram.calls import Calls
from lib_async_lowvram.changeover import Changeover
from lib_async_lowvram.contents import Contents
from lib_async_lowvram.core.order import ExecutionOrder
from lib_async_lowvram.core.ring import Ring
from lib_async_lowvram.core.states import IllegalTransition
from lib_async_lowvram.device.arena import Arena
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.learned import Learned
from lib_async_lowvram.network import Network
from lib_async_lowvram.planning import Planning
from lib_async_lowvram.region_pass import RegionPass
from lib_async_lowvram.residents import Residents
from lib_async_lowvram.slots import Slots
from lib_async_lowvram.steady import SteadyPass
from lib_async_lowvram.streaming import Streaming
from lib_async_lowvram.transfers import Transfers
from lib_async_lowvram.uses import Uses
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, recorded, same, simulated

RING = 2 * LEAF_BYTES
PARTS: list[tuple[type, str]] = [
    *((Unit, name) for name in ("to", "bind", "publish", "unpublish", "host_change", "device_change", "accept_versions", "pack")),
    *((Unit, name) for name in ("publish_unchanged", "unpublish_unchanged")),
    *((Ring, name) for name in ("blockers", "occupy_free", "vacate", "restore", "fences")),
    *((Slots, name) for name in ("free_unwanted", "vacate", "onload", "close", "fences", "steady_order", "is_bound", "restore")),
    *((SteadyPass, name) for name in ("begin", "acquire", "release", "stop")),
    *((Transfers, name) for name in ("onload", "onload_again", "wait_and_publish", "write_back")),
    *((Residents, name) for name in ("onload_next", "onload_before", "arrive", "all_arrived", "sweep", "shed", "expect", "make_room")),
    *((Changeover, name) for name in ("to", "released", "next_pass")),
    *((Uses, name) for name in ("begin_pass", "acquire", "release", "issue_ahead", "finish_leftovers", "_finish")),
    *((Streaming, name) for name in ("begin_pass", "end_pass", "settle", "close")),
    *((RegionPass, name) for name in ("start", "before", "after", "close")),
    *((Contents, name) for name in ("true_up", "adopt", "join", "rebuild")),
    *((ExecutionOrder, name) for name in ("advance", "follow", "begin_pass", "end_pass")),
    *((Planning, name) for name in ("make", "better", "learn", "began", "timed")),
    *((Learned, name) for name in ("plan", "refined")),
    *((Arena, name) for name in ("slot", "block", "release_block")),
    *((Calls, name) for name in ("acquire", "release", "observe", "observed", "running")),
    *((Network, name) for name in ("_begin_moving_regions", "_enter", "_give_back")),
]
INJECTED = "injected by the test"


def halve(leaf: nn.Module) -> None:
    leaf.weight.mul_(0.5)


def bias(leaf: nn.Module) -> None:
    leaf.bias = nn.Parameter(torch.full((1,), 0.25), requires_grad=False)


def job(net: Chain, twin: Chain, mover: AsyncModelMover, streams: Streams) -> None:
    """Learning, streaming, a budget that shrinks and grows, changed weights, another leaf's bias, a module put in, a drain."""
    mover._context.budget = lambda key: RING + 2 * LEAF_BYTES
    for step in range(14):
        if step == 4:
            mover._context.budget = lambda key: RING
        if step == 6:
            mover._context.budget = lambda key: RING + 3 * LEAF_BYTES
        for model in (net, twin):
            model.leaves[1].inside = halve if step in (2, 3) else None
            model.leaves[4].inside = bias if step == 10 else None
            if step == 12:
                model.leaves[5].inserted = nn.LayerNorm(8)
        same(net, twin, streams)
        if step == 9:
            mover.drain()


def fresh() -> tuple[Chain, Chain, AsyncModelMover, Streams]:
    streams = simulated()
    net, twin = pair()
    net.groups = tuple(nn.ModuleList(net.leaves[first : first + 2]) for first in (0, 2, 4))  # networks hold modules weakly
    regions = [Region(group, trigger=group[0]) for group in net.groups]
    return net, twin, attached(NetworkSpec(regions, net), streams, RING + 2 * LEAF_BYTES, passes=0, lookahead_bytes=RING), streams


def counted(owner: type, name: str, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Count the calls of a method, and let one of them fail."""
    original, calls = getattr(owner, name), [0]

    def stand_in(self: object, *args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == fail_at:
            raise KeyError(INJECTED)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, stand_in)
    return calls


@pytest.mark.parametrize(("owner", "name"), PARTS, ids=[f"{owner.__name__}.{name}" for owner, name in PARTS])
def test_the_picture_is_the_same_and_stock_takes_over(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        net, twin, mover, streams = fresh()
        calls = counted(owner, name, patched)
        job(net, twin, mover, streams)
        total = calls[0]
        mover.detach()
    assert total, "the job does not come by here"
    for number in sorted({1, 2, 3, total // 3, total // 2, total - 1, total} & set(range(1, total + 1))):
        caplog.clear()
        with monkeypatch.context() as patched:
            net, twin, mover, streams = fresh()
            told: list[str] = []
            mover.on_demote = told.append
            calls = counted(owner, name, patched, fail_at=number)
            job(net, twin, mover, streams)
            mover.drain()
            if calls[0] < number:
                continue  # how often a part is called depends on times
        assert told == [mover.demoted]
        assert mover.demoted == "net: a fault of this extension (KeyError), see the log"
        assert any(INJECTED in str(record.exc_info) for record in caplog.records if record.levelno >= logging.ERROR)
        assert mover.status()["state"] == "demoted"
        assert not mover.is_attached
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert streams.allocated_bytes == 0
        for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        with torch.no_grad():
            assert torch.equal(net(torch.ones(1, 8)), twin(torch.ones(1, 8)))


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("full"), RuntimeError("device gone"), MemoryError("no")])
def test_errors_of_the_device_go_to_the_host(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)

    def fail(self: Transfers, *args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(Transfers, "onload", fail)
        patched.setattr(Transfers, "onload_again", fail)
        with pytest.raises(type(error)):
            call(net, streams)
            call(net, streams)
    mover.drain()
    assert not mover.demoted
    same(net, twin, streams)
    mover.detach()


def test_an_illegal_transition_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams)
    publishing = {name: getattr(Unit, name) for name in ("publish", "publish_unchanged")}

    def failing(publish: Callable[[Unit], object]) -> Callable[[Unit], object]:
        def fail(self: Unit) -> object:
            if self.name.endswith("3"):
                raise IllegalTransition("injected")
            return publish(self)

        return fail

    with monkeypatch.context() as patched:
        for name, publish in publishing.items():
            patched.setattr(Unit, name, failing(publish))
        with torch.no_grad():
            expected = twin(torch.ones(1, 8))
        with pytest.raises(IllegalTransition):  # the region pass that takes over meets it again: then there is nothing left to try
            call(net, streams)
    mover.drain()
    assert "IllegalTransition" in mover.demoted
    with torch.no_grad():
        assert torch.equal(net(torch.ones(1, 8)), expected)
    streams.check()
