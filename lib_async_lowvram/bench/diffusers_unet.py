"""diffusers' UNet of the same shape and weights as ours, for the peers that need diffusers' classes.

Problem: some peers only work on diffusers' models, and a comparison is fair only where both models hold the same weights and
compute the same function. So our parameter names are mapped to theirs, one to one, and the outputs are compared once per run.

SDXL's label embedding is `class_embedding` there (a projection of the same 2816 numbers): diffusers' own SDXL makes those
numbers inside the model from sizes and a pooled prompt, which computes nothing worth measuring.

diffusers is imported when a model is built. Names: https://github.com/huggingface/diffusers, UNet2DConditionModel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.bench.shapes import RES_BLOCKS, Shape

_RES = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "time": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}
_TRANSFORMER = {
    "norm_self": "norm1",
    "attn_self.to_q": "attn1.to_q",
    "attn_self.to_k": "attn1.to_k",
    "attn_self.to_v": "attn1.to_v",
    "attn_self.to_out": "attn1.to_out.0",
    "norm_cross": "norm2",
    "attn_cross.to_q": "attn2.to_q",
    "attn_cross.to_k": "attn2.to_k",
    "attn_cross.to_v": "attn2.to_v",
    "attn_cross.to_out": "attn2.to_out.0",
    "norm_ff": "norm3",
    "ff.wide": "ff.net.0.proj",
    "ff.narrow": "ff.net.2",
}


def module_names(shape: Shape) -> dict[str, str]:
    """Our name -> diffusers' name of every module that may own parameters; some do not (a skip that is the identity)."""
    return dict(_pairs(shape))


def map_weights(weights: dict[str, torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """The same tensors under diffusers' names. Raises `KeyError` for a parameter that has no place there."""
    names = module_names(shape)
    mapped = {}
    for key, tensor in weights.items():
        module, _, parameter = key.rpartition(".")
        mapped[f"{names[module]}.{parameter}"] = tensor
    return mapped


def _pairs(shape: Shape) -> Iterator[tuple[str, str]]:
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    if shape.label:
        yield from (("label_emb.0", "class_embedding.linear_1"), ("label_emb.2", "class_embedding.linear_2"))
    yield from (("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"))
    levels = len(shape.depths)
    block = 1
    for level, depth in enumerate(shape.depths):
        for number in range(RES_BLOCKS):
            yield from _res(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{number}")
            yield from _attention(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{number}", depth)
            block += 1
        if level < levels - 1:
            yield f"input_blocks.{block}.0", f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    yield from _res("middle_block.0", "mid_block.resnets.0")
    yield from _attention("middle_block.1", "mid_block.attentions.0", shape.middle_depth)
    yield from _res("middle_block.2", "mid_block.resnets.1")
    block = 0
    for turn, depth in enumerate(reversed(shape.depths)):
        for number in range(RES_BLOCKS + 1):
            yield from _res(f"output_blocks.{block}.0", f"up_blocks.{turn}.resnets.{number}")
            yield from _attention(f"output_blocks.{block}.1", f"up_blocks.{turn}.attentions.{number}", depth)
            if turn < levels - 1 and number == RES_BLOCKS:
                yield f"output_blocks.{block}.{2 if depth else 1}.conv", f"up_blocks.{turn}.upsamplers.0.conv"
            block += 1


def _res(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for mine, other in _RES.items():
        yield f"{ours}.{mine}", f"{theirs}.{other}"


def _attention(ours: str, theirs: str, depth: int) -> Iterator[tuple[str, str]]:
    if not depth:
        return
    for mine in ("norm", "proj_in", "proj_out"):
        yield f"{ours}.{mine}", f"{theirs}.{mine}"
    for number in range(depth):
        for mine, other in _TRANSFORMER.items():
            yield f"{ours}.blocks.{number}.{mine}", f"{theirs}.transformer_blocks.{number}.{other}"


def configuration(shape: Shape) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel`. What diffusers calls `attention_head_dim` is the number of heads in its UNets."""
    attends = [bool(depth) for depth in shape.depths]
    return {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        "block_out_channels": shape.widths,
        "layers_per_block": RES_BLOCKS,
        "cross_attention_dim": shape.context,
        "attention_head_dim": tuple(shape.heads_of(width) for width in shape.widths),
        "transformer_layers_per_block": tuple(max(1, depth) for depth in shape.depths[:-1]) + (shape.middle_depth,),
        "use_linear_projection": shape.linear,
        "norm_num_groups": shape.groups,
        "class_embed_type": "projection" if shape.label else None,
        "projection_class_embeddings_input_dim": shape.label or None,
    }


def build(shape: Shape, weights: dict[str, torch.Tensor]) -> nn.Module:
    """diffusers' model over these host tensors (not copies of them), for inference. `weights`: under our names."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**configuration(shape))
    model.load_state_dict(map_weights(weights, shape), assign=True)
    return model.eval().requires_grad_(False)


def arguments(inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Our model's inputs as keyword arguments of theirs, whose output is then a tuple of one tensor."""
    sample, timestep, context, *label = inputs
    given = {"sample": sample, "timestep": timestep, "encoder_hidden_states": context, "return_dict": False}
    return {**given, "class_labels": label[0]} if label else given
