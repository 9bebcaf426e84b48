"""Another UNet in the model's place (`sd_unet`: TensorRT and its kin), traced from a copy: stock's pictures with it, and without it again.

Needs SD_WEBUI_URL (ours) and SD_WEBUI_STOCK_URL, both with `probe_extension` copied into their `extensions` folders.
"""

from __future__ import annotations

import os

import pytest
from webui_client import Server

URL, STOCK = os.environ.get("SD_WEBUI_URL"), os.environ.get("SD_WEBUI_STOCK_URL")
NO_SERVERS = "SD_WEBUI_URL and SD_WEBUI_STOCK_URL name no running WebUIs"
pytestmark = [pytest.mark.webui, pytest.mark.skipif(not URL or not STOCK, reason=NO_SERVERS)]

LABEL = "probe traced"
JOB = {"prompt": "a cat, (gold:1.3)", "steps": 6, "width": 192, "height": 192, "seed": 7, "sampler_name": "Euler a", "cfg_scale": 7}


@pytest.fixture
def servers():
    made = Server(URL), Server(STOCK)
    made[0].set_options(async_lowvram_enabled=True, async_lowvram_budget_mb=16)
    yield made
    for server in made:
        server.set_options(sd_unet="Automatic")
        server.pictures("txt2img", JOB)


def both(servers, **options) -> list[str]:
    for server in servers:
        server.set_options(**options)
    ours, stock = (server.pictures("txt2img", JOB) for server in servers)
    assert ours == stock
    return ours


def test_there_and_back(servers):
    ours = servers[0]
    if ours.status()["placement_faults"] is not None:
        pytest.skip("tracing cannot be watched by the placement checker: start the servers with ASYNC_LOWVRAM_CHECK_PLACEMENT=0")
    own = both(servers, sd_unet="None")
    before = ours.status()["networks"]["unet"]["streamed_bytes"]
    override = both(servers, sd_unet=LABEL)
    after = ours.status()["networks"]["unet"]["streamed_bytes"]
    assert after - before <= ours.status()["networks"]["unet"]["weight_bytes"]  # one pass's, begun before the host asked for the other
    assert both(servers, sd_unet=LABEL) == override
    assert both(servers, sd_unet="None") == own
    status = ours.status()
    assert status["state"] == "active", status["last_error"]
    print(f"\nown {own}, traced {override}; {after - before} bytes streamed while the other UNet computed")
