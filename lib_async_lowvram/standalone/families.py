"""Families of models that checkpoints hold, with the configuration of each network: constants of ours, so that nothing is fetched.

Values are those of the published models: the LDM code's v1-inference.yaml and generative-models' sd_xl_base.yaml, in the terms of
diffusers' `UNet2DConditionModel` and `AutoencoderKL` and transformers' `CLIPTextConfig`. A checkpoint's family is told from the names in
its header.

Pure. Layer of data: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lib_async_lowvram.standalone.errors import CannotMake

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True)
class TextEncoder:
    """One of a model's text encoders.

    Attributes:
        prefix: of its names in the file. config: of `CLIPTextConfig`. open_clip: named as OpenCLIP names it, else as transformers does.
        pads_with: the token behind the prompt's end. penultimate: the states before the last layer are what counts, and not the
            normed last ones. projects: its pooled output counts, too.
    """

    prefix: str
    config: dict[str, Any]
    open_clip: bool = False
    pads_with: str = "<|endoftext|>"
    penultimate: bool = False
    projects: bool = False


@dataclass(frozen=True)
class Family:
    """name: for messages. text: its encoders, whose states are put side by side. text_time: the UNet is given the pooled text and the
    picture's size. wide_vae: the VAE overflows in half precision. sdxl: tiles as for models trained at 1024 pixels."""

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: tuple[TextEncoder, ...]
    text_time: bool = False
    wide_vae: bool = False
    sdxl: bool = False


_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_CLIP = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
}
_CLIP_L = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_G = {
    **_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}

# What diffusers calls `attention_head_dim` is the number of heads in these UNets.
SD15 = Family(
    "SD1.5",
    unet={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    vae={**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    text=(TextEncoder("cond_stage_model.transformer.", _CLIP_L),),
)

SDXL = Family(
    "SDXL",
    unet={
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    text=(
        TextEncoder("conditioner.embedders.0.transformer.", _CLIP_L, penultimate=True),
        TextEncoder("conditioner.embedders.1.model.", _CLIP_G, open_clip=True, pads_with="!", penultimate=True, projects=True),
    ),
    text_time=True,
    wide_vae=True,
    sdxl=True,
)

FAMILIES = (SD15, SDXL)


def family_of(names: Iterable[str]) -> Family:
    """Of a checkpoint whose tensors have these names. `CannotMake` for any other kind, saying which it seems to be."""
    names = set(names)
    if not any(name.startswith(UNET) for name in names):
        raise CannotMake(f"this file holds no UNet in the LDM code's naming ({UNET}...): a LoRA, a VAE, or diffusers' own naming?")
    for family in FAMILIES:
        if all(any(name.startswith(encoder.prefix) for name in names) for encoder in family.text):
            return family
    if any(name.startswith("cond_stage_model.model.") for name in names):
        raise CannotMake("an SD2 checkpoint: only SD1 and SDXL are known here")
    if any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise CannotMake("an SDXL refiner: it makes no picture alone")
    raise CannotMake("this file holds no text encoder of SD1 or SDXL")
