"""When the LoRA tests run, and their fixtures around a `Pair` of servers (imported by conftest.py).

The servers, and what only they need, are touched when a test first asks for them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLES = ("SD_WEBUI_URL", "SD_WEBUI_STOCK_URL", "SD_WEBUI_LORA_DIR")
_missing = [name for name in VARIABLES if not os.environ.get(name)]
NEEDS_SERVERS = [pytest.mark.webui, pytest.mark.skipif(bool(_missing), reason=f"not set: {', '.join(_missing)}")]
DEFAULTS = {
    "async_lowvram_enabled": True,
    "async_lowvram_lookahead_mb": 0,
    "async_lowvram_pinned_mb": 0,
    "async_lowvram_always_write_back": False,
}
HOST_DEFAULTS = {"lora_functional": False, "batch_cond_uncond": True, "sd_checkpoints_limit": 1}


@pytest.fixture(scope="module")
def servers():
    """Both servers with the network files for the checkpoint they have loaded, as they were found afterwards."""
    pytest.importorskip("safetensors")
    from lora_pair import Pair
    from make_networks import make_networks
    from webui_client import Server

    ours, stock, folder = (os.environ[name] for name in VARIABLES)
    pair = Pair(Server(ours), Server(stock))
    pair.set_options(sd_model_checkpoint=pair.checkpoint, **HOST_DEFAULTS)
    pair.files = make_networks(pair.checkpoint_file, Path(folder))
    pair.post("/sdapi/v1/refresh-loras")
    known = {network["name"] for server in pair.both() for network in server.get("/sdapi/v1/loras")}
    assert known >= set(pair.files), "the servers look for Lora files elsewhere"
    pair.ours.set_options(**DEFAULTS, async_lowvram_budget_mb=0)
    yield pair
    pair.set_options(sd_model_checkpoint=pair.checkpoint, **HOST_DEFAULTS)
    pair.ours.set_options(**DEFAULTS, async_lowvram_budget_mb=0)


@pytest.fixture(scope="module", params=["streamed", "resident"])
def placed(request, servers):
    """Under a quarter of the UNet, then under the automatic budget; every network has learned its order."""
    from lora_pair import job

    mib = 1 << 20
    servers.streamed = request.param == "streamed"
    servers.ours.pictures("txt2img", job())
    weights = servers.ours.status()["networks"]["unet"]["weight_bytes"]
    servers.ours.set_options(async_lowvram_budget_mb=weights // 4 // mib if servers.streamed else 0)
    for number in range(2):
        servers.run("learning", job(prompt=servers.unheard_of(number)))
    return servers


@pytest.fixture
def pair(placed):
    """Each test starts from the same settings and weights, whatever the one before left."""
    placed.set_options(sd_model_checkpoint=placed.checkpoint, **HOST_DEFAULTS)
    placed.ours.set_options(**DEFAULTS)
    return placed


@pytest.fixture
def plain(pair):
    """The pictures without any network: the same ones whenever they are made."""
    from lora_pair import job

    pictures = pair.run("without", job()).pictures
    assert pictures == pair.plain.setdefault(pair.streamed, pictures)
    assert len({tuple(each) for each in pair.plain.values()}) == 1
    return pictures
