"""Chains whose masters may not all be pinned, the changes made to them, and what must hold after every test of staging."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover
from lib_async_lowvram.device.recorder import RecordingStreams
from tests.mover.chains import LEAF_BYTES, Chain, attached, pair, simulated

ALL = 6 * LEAF_BYTES
SLOW = {"bandwidth": 2e8, "latency": 1e-5, "jitter_seconds": 2e-5, "seed": 7}


class Stop(BaseException):
    """As the WebUI's interrupt."""


def staging_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "async-lowvram-staging"]


def judged(**settings: Any) -> RecordingStreams:
    return RecordingStreams(simulated(**{**SLOW, **settings}))


def staged(limit: int, streams: Any = None, budget: int = 1, passes: int = 2, **more: Any) -> tuple[Chain, Chain, AsyncModelMover, Any]:
    streams = streams or judged()
    net, twin = pair()
    return net, twin, attached(net, streams, budget, passes=passes, pinned_limit_bytes=limit, **more), streams


def finished(mover: AsyncModelMover, streams: Any, net: nn.Module, twin: nn.Module) -> None:
    """Weights are right, nothing is held, judges are content."""
    assert not mover.status()["placement_faults"], mover.status()["last_error"]
    mover.detach()
    assert mover.status()["pinned_bytes"] == 0 and streams.allocated_bytes == 0
    assert not staging_threads()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if isinstance(streams, RecordingStreams):
        streams.check()
