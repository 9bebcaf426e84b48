"""The placement judge: on the simulated device, catches what CUDA would refuse.

Problem: host and device are both CPU tensors on the simulated device, so an operation that reads a weight's host master
instead of its device copy just works there, and fails (or silently costs a transfer) on a GPU. `PlacementChecker` sees
every aten operation of the thread that entered it and fails when one reads or writes host weights.

Invariant judged: I4 (inside forward, parameters point at a ready device tensor).

Called by the network around each streamed region, on the sampling thread, when `check_placement` is set, and by tests.
Not for production speed, but cheap: one schema look-up and a bisect per tensor argument.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _get_current_dispatch_mode_stack

from .op_access import OpAccess, byte_range


class PlacementFault(RuntimeError):
    """An operation inside a streamed region touched host weights."""


class PlacementChecker(TorchDispatchMode):
    """Fails, or counts, when an operation touches host weights.

    Attributes:
        faults: how many operations did, since construction.
        last_fault: what the last one was, for people; None before the first.
    """

    def __init__(self, is_host_weight: Callable[[int, int], bool], *, counting: bool = False) -> None:
        """`is_host_weight(start, end)`: whether the bytes [start, end) share any with host weights: usually
        `HostRanges.overlaps`. `counting`: only count, never raise."""
        super().__init__()
        self._is_host_weight = is_host_weight
        self._counting = counting
        self._access = OpAccess()
        self._lock = threading.Lock()
        self._suspended = threading.local()
        self.faults = 0
        self.last_fault: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Newer torch asks; True would import torch._dynamo at the first operation and cost a detour at each."""
        return False

    # -- entering and leaving ------------------------------------------------------------------------------------------
    def enter(self) -> bool:
        """Start judging this thread's operations. True when it did; False when it was at it already (nested, or left
        over from a BaseException that skipped `exit`). Does not count: one `exit` ends any number of `enter`s."""
        if any(mode is self for mode in _get_current_dispatch_mode_stack()):
            return False
        self.__enter__()
        return True

    def exit(self) -> bool:
        """Stop judging this thread's operations. True when it did. False, and nothing is touched, when this thread does
        not have it on top of its mode stack: popping then would take somebody else's mode away."""
        if _get_current_dispatch_mode() is not self:
            return False
        self.__exit__(None, None, None)
        return True

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The calling thread may touch host weights inside: for the mover's own work between two operations."""
        before = getattr(self._suspended, "now", False)
        self._suspended.now = True
        try:
            yield
        finally:
            self._suspended.now = before

    # -- judging -------------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(self._suspended, "now", False):
            return func(*args, **kwargs)
        definite, views = self._access.split(func, args, kwargs)
        for tensor, writes in definite:
            self._judge(func, tensor, "writes" if writes else "reads")
        result = func(*args, **kwargs)
        for tensor in self._access.read_by_view(views, result):
            self._judge(func, tensor, "copies")
        return result

    def _judge(self, func: Any, tensor: torch.Tensor, does: str) -> None:
        where = byte_range(tensor)
        if where is None or not self._is_host_weight(*where):
            return
        message = (
            f"{func} {does} host weights: {tuple(tensor.shape)} {tensor.dtype} at {where[0]:#x}..{where[1]:#x} "
            f"(a parameter or buffer was not on the device)"
        )
        with self._lock:
            self.faults += 1
            self.last_fault = message
        if not self._counting:
            raise PlacementFault(message)
