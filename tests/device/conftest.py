"""The simulated device, waiting asleep and waiting awake."""

from __future__ import annotations

import math

import pytest

from lib_async_lowvram.device.simulated import SimulatedStreams


@pytest.fixture(params=[False, True], ids=["asleep", "awake"])
def streams(request):
    made = SimulatedStreams(capacity_bytes=1 << 24, bandwidth=math.inf, latency=0.0, busy=request.param)
    yield made
    made.close()
