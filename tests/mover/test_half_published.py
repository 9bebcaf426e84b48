"""Stopped between two parameters of one unit, on their way to the device or back: nothing is lost, and the next pass is as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram.device.entries import NONE
from lib_async_lowvram.device.weights import Unit
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, same, simulated


class Interrupt(BaseException):
    """As the host's own: past every `except Exception`."""


def biased() -> Chain:
    net = Chain()
    for leaf in net.leaves:
        leaf.bias = nn.Parameter(torch.randn(1))
    return net


@pytest.mark.parametrize("error", [Interrupt, torch.cuda.OutOfMemoryError, KeyError])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("number", [1, 4])
def test_stopped_between_two_parameters(error: type[BaseException], back: bool, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = simulated()
    net, twin = pair(biased)
    mover = attached(net, streams, budget=2 * LEAF_BYTES + 2048, passes=4)
    name, calls, halves = "unpublish_unchanged" if back else "publish_unchanged", [], []
    original = getattr(Unit, name)

    def half(self: Unit) -> bool:
        calls.append(self)
        if len(calls) != number:
            return original(self)
        found: list[tuple[nn.Parameter, object]] = []
        assert self._change(back, found) is NONE and len(found) == 2
        parameter, entry = found[0]
        parameter.data = entry.master if back else entry.device
        halves.append([parameter.data_ptr() == entry.device_ptr for parameter, entry in found])
        raise error("injected by the test")

    with monkeypatch.context() as patched:
        patched.setattr(Unit, name, half)
        if error is KeyError:  # a fault of ours: stock's moves take over in the middle of the pass
            same(net, twin, streams)
        else:
            with pytest.raises(error):
                call(net, streams)
    assert halves == [[not back, back]]
    for _ in range(3):
        same(net, twin, streams)
    assert bool(mover.demoted) == (error is KeyError)
    mover.drain()
    assert streams.allocated_bytes == 0
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    mover.detach()
