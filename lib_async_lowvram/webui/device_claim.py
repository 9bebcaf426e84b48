"""Who has the device: keeping `lowvram.module_in_gpu` true while the mover, and not stock, moves things.

Problem: stock keeps one module on the device and remembers it in `module_in_gpu`. Its hooks on what we do not manage, its
`send_everything_to_cpu`, and other extensions all send that module away with `.to(cpu)`, or write None over it.
Solution: while the mover may have something on the device, `module_in_gpu` is a module that owns nothing and whose `.to`
makes the mover leave. So whoever takes the device over the stock way takes it from us, too; and when we take it, what stock
had there leaves first, as under stock.

Called by `lowvram.Integration`: `claim` and `region_entered` on the thread that computes, `leave` from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")


class OnDevice(nn.Module):
    """What stands in `module_in_gpu`."""

    def __init__(self, leave: Callable[[], None]) -> None:
        super().__init__()
        self._leave = leave

    def to(self, *args: Any, **kwargs: Any) -> OnDevice:
        self._leave()
        return self


class DeviceClaim:
    """`lowvram`: the host's module. `drain`: makes the mover leave the device."""

    def __init__(self, lowvram: ModuleType, drain: Callable[[], None]) -> None:
        self._lowvram = lowvram
        self._drain = drain
        self._token = OnDevice(self.leave)
        self._unet_starting_on: int | None = None  # thread in a UNet pass none of whose blocks has run yet

    def claim(self, *, unet_pass: bool = False) -> None:
        """A pass of ours starts on this thread. `unet_pass`: it is the UNet being called."""
        self._take()
        self._unet_starting_on = threading.get_ident() if unet_pass else None

    @property
    def unet_is_starting(self) -> bool:
        """Whether this thread is in a UNet pass none of whose blocks has run yet."""
        return self._unet_starting_on == threading.get_ident()

    def region_entered(self) -> None:
        """A block, or another module that stock would move, is about to run."""
        self._take()
        self._unet_starting_on = None

    def _take(self) -> None:
        present = self._lowvram.module_in_gpu
        if present is self._token:
            return
        if present is not None:
            present.to(CPU)
        self._lowvram.module_in_gpu = self._token

    def leave(self) -> None:
        """Somebody wants the device: ours off it. Except at the start of a UNet pass, on its own thread: ControlNet asks
        there, at every pass, and means what stock may have left there."""
        if not self.unet_is_starting:
            self._drain()

    def job_over(self) -> None:
        """No pass can be starting any more, even if the last one was broken off as it started."""
        self._unet_starting_on = None

    def give_up(self) -> None:
        """Ours has left, or nothing is managed any more: back to stock's own notion of what is on the device."""
        if self._lowvram.module_in_gpu is self._token:
            self._lowvram.module_in_gpu = None
