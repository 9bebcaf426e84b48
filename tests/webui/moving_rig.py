"""The integration over the real mover on the simulated device, and what a job of the host is: for tests of whole pictures."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.webui.host import Host
from lib_async_lowvram.webui.lowvram import Integration
from lib_async_lowvram.webui.settings import SettingsReader

KINDS = ["sd1", "sd2", "sdxl"]
BUDGET = 24 << 10


class Interrupt(BaseException):
    """As the host's own: not an Exception."""


@pytest.fixture
def moving(webui):
    """A started integration whose mover works with a budget of a few blocks."""
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=200e6, latency=1e-5, jitter_seconds=2e-4, seed=3, poison=True)
    movers = []

    def make_mover(config, device):
        # A budget under one megabyte is below what the slider can say, and these models are that small.
        small = OffloadConfig(budget_bytes=BUDGET, small_leaf_bytes=0, check_placement=True)
        movers.append(AsyncModelMover(small, streams))
        movers[-1].configure = lambda config: None
        return movers[-1]

    host = Host("1.10.1", False, torch.device("cpu"), True, "simulated")
    integration = Integration.start(host, settings=SettingsReader(environment={}), make_mover=make_mover)
    integration.movers = movers
    yield integration
    integration._in_job = False
    integration.close()
    streams.close()


def job(webui, model, **kwargs):
    """One picture as a job of the host, with the moments the extension relies on."""
    state = webui.shared.state
    state.begin("job")
    try:
        return tiny_models.picture(model, **kwargs)
    finally:
        webui.lowvram.send_everything_to_cpu()
        webui.devices.torch_gc()
        state.end()


def worked(integration, *, undisturbed=True):
    """The mover did its work, kept its promises, and nothing is left on the device. `undisturbed`: nobody made it leave the
    device in the middle of sampling, which it may have to wait for."""
    status = integration.status()
    assert status["state"] == "active", status
    assert status["streamed_bytes"] > 0 and status["hits"] > 0
    assert status["placement_faults"] == 0, status["last_error"]
    assert status["host_waits"] == 0 or not undisturbed
    assert 0 < status["peak_weight_bytes"] <= BUDGET
    assert status["allocated_bytes"] == 0
    return status


def expected(kind, **kwargs):
    return tiny_models.picture(tiny_models.make(kind), **kwargs)
