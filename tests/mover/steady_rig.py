"""For tests of followed passes: networks that have come to be followed, and who was asked for what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover
from lib_async_lowvram.core.order import ExecutionOrder
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.steady import SteadyPass
from tests.mover.chains import Chain, Leaf, attached, pair, recorded

LEAVES = 6
BUDGETS = [1, 45_000, 60_000, 70_000]
"""For `Uneven`: from the least to one under which three leaves stream."""


class Asked:
    """How many units the order and a followed pass were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order = self.steady = 0
        advance, acquire = ExecutionOrder.advance, SteadyPass.acquire

        def counted_advance(order: ExecutionOrder, unit: int) -> bool:
            self.order += 1
            return advance(order, unit)

        def counted_acquire(steady: SteadyPass, unit: object) -> bool:
            answer = acquire(steady, unit)
            self.steady += answer
            return answer

        monkeypatch.setattr(ExecutionOrder, "advance", counted_advance)
        monkeypatch.setattr(SteadyPass, "acquire", counted_acquire)

    def during(self, work: Callable[[], object]) -> tuple[int, int]:
        """(by the order, by a followed pass) while `work` is done."""
        self.order = self.steady = 0
        work()
        return self.order, self.steady


def made(passes: int = 4, **config: object) -> tuple[Chain, Chain, AsyncModelMover, RecordingStreams]:
    """A network whose passes are followed, under the least budget, on a judged device that poisons what was left; and its twin."""
    streams = recorded(poison=True)
    net, twin = pair()
    return net, twin, attached(net, streams, passes=passes, **config), streams


class Uneven(nn.Module):
    """Leaves of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves = nn.ModuleList(Leaf(rows) for rows in (16, 512, 64, 64, 512, 16, 16, 128, 256, 400, 32, 512, 16))

        self.order = list(range(len(self.leaves)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in self.order:
            x = self.leaves[place](x)
        return x


def uneven(budget: int, **settings: object) -> tuple[Uneven, Uneven, AsyncModelMover, RecordingStreams]:
    streams = recorded(poison=True, **settings)
    net, twin = pair(Uneven)
    return net, twin, attached(net, streams, budget, passes=4), streams
