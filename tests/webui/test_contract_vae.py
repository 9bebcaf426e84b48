"""The tiled VAE on the encoder and decoder of a real WebUI's own sources (SD 1 and 2, and SDXL), where SD_WEBUI_DIR names a checkout."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from checkout import CHECKOUT, NEEDS_CHECKOUT

from lib_async_lowvram.large.tiled_vae import EXACT, Limits, run
from tests.large.measures import psnr

pytestmark = NEEDS_CHECKOUT
SOURCES = {"stable-diffusion-stability-ai": "ldm", "generative-models": "sgm"}
SIZES = {"ch": 32, "out_ch": 3, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 2, "attn_resolutions": [], "in_channels": 3, "resolution": 256}


def rearrange(x: torch.Tensor, pattern: str, **sizes: int) -> torch.Tensor:
    """Of einops, which need not be installed here: what these files ask of it."""
    if pattern == "b c h w -> b 1 (h w) c":
        return x.flatten(2).transpose(1, 2)[:, None]
    assert pattern == "b 1 (h w) c -> b c h w"
    return x[:, 0].transpose(1, 2).unflatten(2, (sizes["h"], sizes["w"]))


@pytest.mark.parametrize("repository", list(SOURCES))
@torch.no_grad()
def test_decoder_and_encoder(repository: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SOURCES[repository]
    path = Path(CHECKOUT) / "repositories" / repository / package / "modules" / "diffusionmodules" / "model.py"
    if not path.is_file():
        pytest.skip(f"this checkout has no {repository}")
    # What the file imports and a VAE without xformers does not use.
    for name in (package, f"{package}.modules", f"{package}.modules.attention", "einops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    attention, einops = sys.modules[f"{package}.modules.attention"], sys.modules["einops"]
    attention.MemoryEfficientCrossAttention, attention.LinearAttention, einops.rearrange = object, object, rearrange
    name = f"{package}.modules.diffusionmodules.model"
    monkeypatch.setitem(sys.modules, f"{package}.modules.diffusionmodules", types.ModuleType(package))
    spec = importlib.util.spec_from_file_location(name, path)
    model = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, model)
    spec.loader.exec_module(model)
    decoder, encoder = model.Decoder(**SIZES, z_channels=4).eval(), model.Encoder(**SIZES, z_channels=4).eval()
    for network, x in ((decoder, torch.randn(1, 4, 20, 12)), (encoder, torch.randn(1, 3, 160, 96))):
        got, report = run(network, x, Limits(4 << 20, 1 << 40, most_rows=16))
        expected = network(x)
        assert report.mode == EXACT and report.spilled_bytes > 0
        # Random weights: in standard deviations of what comes out.
        assert psnr(got / expected.std(), expected / expected.std()) > 80
