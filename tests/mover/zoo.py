"""A small network of the leaves that LoRA and its like change, in blocks as stock hooks them; and a rig to run it beside a twin.

Convolutions and linear leaves with and without bias, norms, and a `MultiheadAttention` that reads its silent `out_proj`.
Every value reaches the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.streams import Streams
from tests.mover.chains import X, call, pair, recorded, simulated

MIXED, EVERYTHING = 16 << 10, 1 << 20
BUDGETS = [1, MIXED, EVERYTHING]
"""The least (everything streams that can), some of each, everything resident."""

DEVICES = {"jittery": lambda: simulated(bandwidth=2e8, latency=1e-5, jitter_seconds=1e-4, seed=5), "recorded": recorded}

every_budget = pytest.mark.parametrize("budget", BUDGETS, ids=["least", "mixed", "resident"])
every_device = pytest.mark.parametrize("device", list(DEVICES))


class ZooBlock(nn.Module):
    """Tokens of width 8 in, the same out."""

    def __init__(self, attention_bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, bias=attention_bias, batch_first=True)
        self.group = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.linear = nn.Linear(8, 8, bias=False)
        self.wide = nn.Linear(8, 64)
        self.narrow = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        image = x.transpose(1, 2).reshape(-1, 8, 2, 2)
        x = x + self.conv(self.group(image)).reshape(-1, 8, 4).transpose(1, 2)
        return x + self.narrow(torch.tanh(self.wide(self.linear(x))))


class Zoo(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(ZooBlock(attention_bias=number % 2 == 0) for number in range(blocks))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).reshape(-1, 4, 8)
        for block in self.blocks:
            x = block(x)
        return self.out(x).sum(1)

    def spec(self) -> NetworkSpec:
        """As stock hooks a UNet: block by block, with `out` outside of all."""
        return NetworkSpec([Region(self.enter), *map(Region, self.blocks)], self, roots=[self])


class Rig:
    """A managed network and its twin. Attributes: net, twin, mover, streams."""

    def __init__(self, streams: Streams, budget: int, make: Callable[[], nn.Module] = Zoo, passes: int = 2, whole: bool = False) -> None:
        self.streams = streams
        self.net, self.twin = pair(make)
        self.mover = AsyncModelMover(OffloadConfig(budget_bytes=budget, small_leaf_bytes=0, check_placement=True), streams)
        self.mover.attach({"net": self.net if whole else self.net.spec()})
        self.passes(passes)

    def both(self, action: Callable[[Any], object]) -> None:
        """The same to both."""
        for net in (self.net, self.twin):
            action(net)

    def passes(self, number: int = 1) -> None:
        """Passes of both, equal bit for bit."""
        for _ in range(number):
            with torch.no_grad():
                expected = self.twin(X)
            got = call(self.net, self.streams)
            assert torch.equal(got, expected)

    def counted(self, passes: int = 1) -> dict[str, int]:
        """How much each counter grew over as many passes."""
        names = ("write_backs", "refetches", "adopted", "write_back_waits", "hits", "misses", "passes", "learning_passes")
        before = self.mover.status()
        self.passes(passes)
        after = self.mover.status()
        return {name: after[name] - before[name] for name in names}

    def unjudged(self) -> AbstractContextManager:
        """Inside, host weights may be touched in the middle of a pass."""
        return self.mover._context.checker.suspended()

    def worked(self, budget: int) -> None:
        """The mover was at work, and the judges are content."""
        status = self.mover.status()
        assert status["state"] == "active"
        assert status["placement_faults"] == 0, status["last_error"]
        assert status["host_waits"] == 0 or status["adopted"] > 0  # packing anew waits for copies still under way
        assert status["passes"] > 0
        if budget == EVERYTHING:
            assert status["ring_bytes"] == 0 and status["resident_bytes"] > 0
        else:
            assert status["hits"] > 0 and status["streamed_bytes"] > status["resident_bytes"]
        if isinstance(self.streams, RecordingStreams):
            self.streams.check()

    def same_weights(self) -> None:
        """What a reader of the managed weights sees is the twin's, name by name."""
        mine, theirs = self.net.state_dict(), self.twin.state_dict()
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name].dtype == value.dtype, name
            assert mine[name].stride() == value.stride(), name
            assert torch.equal(mine[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name

    def finish(self, budget: int) -> None:
        """Everything is given back, as it should be now."""
        self.worked(budget)
        self.mover.drain()
        assert self.streams.allocated_bytes == 0
        self.same_weights()
        self.mover.detach()
        self.same_weights()
        if isinstance(self.streams, RecordingStreams):
            self.streams.check()


@contextmanager
def rig(device: str, budget: int, make: Callable[[], nn.Module] = Zoo, **more: Any) -> Iterator[Rig]:
    """A rig on one of `DEVICES`, that must end in order."""
    made = Rig(DEVICES[device](), budget, make, **more)
    yield made
    made.finish(budget)
