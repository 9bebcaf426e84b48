"""What stock's moves would cost, on the simulated device.

Problem: there the host believes that it computes on a CPU, where `.to()` moves nothing; a trial against such a stock would say nothing.
So each of the UNet's blocks waits, when it is its turn, for as long as stock's two copies - the block before it back, itself there - take
on the simulated link. Used by a trial on the simulated device, and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from lib_async_lowvram.device.choose import simulated_link
from lib_async_lowvram.webui.regions import blocks_of


class StocksMoves:
    """While entered. `sleep`: seconds."""

    def __init__(self, unet: nn.Module, sleep: Callable[[float], None] = time.sleep) -> None:
        self._blocks = blocks_of(unet)
        self._bandwidth, self._latency = simulated_link()
        self._sleep = sleep
        self._there: nn.Module | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> StocksMoves:
        self._handles = [block.register_forward_pre_hook(self._turn) for block in self._blocks]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _turn(self, block: nn.Module, arguments: tuple) -> None:
        if self._there is block:
            return
        moved = [each for each in (self._there, block) if each is not None]
        self._there = block
        self._sleep(sum(_nbytes(each) for each in moved) / self._bandwidth + len(moved) * self._latency)


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
