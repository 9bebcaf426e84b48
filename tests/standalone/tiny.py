"""A small model of each family, in a file: what the tests make pictures from, within seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from lib_async_lowvram.standalone.families import SD15, SDXL, Family
from tests.standalone.make_checkpoint import write

_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 32}
_VAE = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
_UNET = {"block_out_channels": (32, 64, 64), "layers_per_block": 1}


def _text(family: Family) -> tuple:
    return tuple(replace(each, config={**each.config, **_TEXT}) for each in family.text)


TINY_SD15 = replace(
    SD15,
    unet={
        **SD15.unet, **_UNET, "cross_attention_dim": 32, "attention_head_dim": 4,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 2, "DownBlock2D"), "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2),
    },
    vae={**SD15.vae, **_VAE},
    text=_text(SD15),
)  # fmt: skip
TINY_SDXL = replace(
    SDXL,
    unet={
        **SDXL.unet, **_UNET, "cross_attention_dim": 64, "attention_head_dim": (2, 4, 4), "transformer_layers_per_block": (1, 1, 2),
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    vae={**SDXL.vae, **_VAE},
    text=_text(SDXL),
)  # fmt: skip


def tiny_file(folder: Path, family: Family, dtype: torch.dtype = torch.float16) -> Path:
    """A checkpoint of that family."""
    path = folder / f"{family.name}.safetensors"
    write(path, family, seed=3, dtype=dtype)
    return path
