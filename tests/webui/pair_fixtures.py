"""What the end-to-end tests of features share: small jobs, and the fixture that has both servers under a budget.

Importable without servers and without Pillow; then everything is skipped.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from test_e2e import STEPS, TXT2IMG, init_image
from test_e2e import img2img as full_img2img
from test_e2e import inpainting as full_inpainting

URL, STOCK_URL = os.environ.get("SD_WEBUI_URL", ""), os.environ.get("SD_WEBUI_STOCK_URL", "")

needs_servers = [
    pytest.mark.webui,
    pytest.mark.skipif(not (URL and STOCK_URL), reason="SD_WEBUI_URL and SD_WEBUI_STOCK_URL name no running WebUIs"),
]
QUARTER_AND_AUTOMATIC = pytest.mark.parametrize("pair", ["quarter", "automatic"], indirect=True)

JOB = {**TXT2IMG, "width": 128, "height": 128}
"""Small: what is tested is what moves, and there are many."""
BIG = {**JOB, "width": 256, "height": 192}

__all__ = ["BIG", "JOB", "QUARTER_AND_AUTOMATIC", "STEPS", "hires", "img2img", "inpainting", "needs_servers", "pair", "picture", "servers"]


def img2img(**changes: Any) -> dict[str, Any]:
    return full_img2img(**{"width": 128, "height": 128, **changes})


def inpainting(**changes: Any) -> dict[str, Any]:
    return full_inpainting(width=128, height=128, **changes)


def hires(**changes: Any) -> dict[str, Any]:
    return {**JOB, "enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6, **changes}


def picture(size: int) -> str:
    """One to start from, encoded."""
    from webui_client import encode

    return encode(init_image(size, size))


@pytest.fixture(scope="module")
def servers():
    from server_pair import Pair

    found = Pair(URL, STOCK_URL, JOB)
    yield found
    found.ours.set_options(async_lowvram_budget_mb=0)


@pytest.fixture
def pair(servers, request):
    """Both servers; ours at a quarter of the UNet, or as parametrised."""
    servers.use_budget(getattr(request, "param", "quarter"))
    return servers
