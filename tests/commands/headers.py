"""Safetensors files with a header and no data, of UNets under each set of names: sparse files, so that gigabytes are not written.

Names and shapes come from `bench/unet.py`'s modules (on the meta device), whose parameter counts are those of the published
models, translated to the names that the published checkpoints use.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from lib_async_lowvram.bench.shapes import Shape
from lib_async_lowvram.bench.unet import UNet

BYTES = {"F16": 2, "BF16": 2, "F32": 4, "I8": 1}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""name -> (dtype, shape)"""

_INNER = {
    "blocks": "transformer_blocks",
    "norm_self": "norm1",
    "attn_self": "attn1",
    "norm_cross": "norm2",
    "attn_cross": "attn2",
    "norm_ff": "norm3",
    "to_out": "to_out.0",
    "wide": "net.0.proj",
    "narrow": "net.2",
}
_RESIDUAL_LDM = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "time": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
_RESIDUAL_DIFFUSERS = {
    "norm_in": "norm1",
    "conv_in": "conv1",
    "time": "time_emb_proj",
    "norm_out": "norm2",
    "conv_out": "conv2",
    "skip": "conv_shortcut",
}


def bench(shape: Shape, dtype: str = "F16") -> Tensors:
    """As `write_checkpoint` names them."""
    with torch.device("meta"):
        model = UNet(shape)
    return {name: (dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters()}


def ldm(shape: Shape, dtype: str = "F16", prefix: str = "model.diffusion_model.") -> Tensors:
    """As in the checkpoints that the WebUI loads."""
    return {prefix + _ldm(name, tensor[1]): tensor for name, tensor in bench(shape, dtype).items()}


def diffusers(shape: Shape, dtype: str = "F16") -> Tensors:
    """As in diffusers' `unet/` folders."""
    return {_diffusers(name, shape): tensor for name, tensor in bench(shape, dtype).items()}


def _ldm(name: str, size: tuple[int, ...]) -> str:
    if match := re.fullmatch(r"(input_blocks\.\d+\.0)\.(weight|bias)", name):
        return name if name.startswith("input_blocks.0.") else f"{match[1]}.op.{match[2]}"
    name = re.sub(r"^label_emb\.", "label_emb.0.", name)
    return _translated(name, {**_RESIDUAL_LDM, **_INNER})


def _translated(name: str, words: dict[str, str]) -> str:
    return ".".join(words.get(part, part) for part in name.split("."))


def _diffusers(name: str, shape: Shape) -> str:
    levels = len(shape.multipliers)
    plain = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0": "add_embedding.linear_1",
        "label_emb.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    for start, translated in plain.items():
        if re.fullmatch(rf"{re.escape(start)}\.(weight|bias)", name):
            return translated + name[len(start) :]
    if name.startswith("middle_block."):
        _, number, rest = name.split(".", 2)
        place = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[number]
        return f"mid_block.{place}.{_translated(rest, _INNER if number == '1' else _RESIDUAL_DIFFUSERS)}"
    side, block, layer, rest = name.split(".", 3)
    if side == "input_blocks":
        level, place = divmod(int(block) - 1, 3)
        if place == 2:
            return f"down_blocks.{level}.downsamplers.0.conv.{rest}"
        base = f"down_blocks.{level}"
    else:
        level, place = divmod(int(block), 3)
        base = f"up_blocks.{level}"
        if rest.startswith("conv."):
            return f"{base}.upsamplers.0.{rest}"
    assert level < levels
    if layer == "0":
        return f"{base}.resnets.{place}.{_translated(rest, _RESIDUAL_DIFFUSERS)}"
    return f"{base}.attentions.{place}.{_translated(rest, _INNER)}"


def header(tensors: Tensors) -> tuple[dict, int]:
    """(header, bytes of data)"""
    at, found = 0, {}
    for name, (dtype, shape) in tensors.items():
        nbytes = BYTES[dtype]
        for size in shape:
            nbytes *= size
        found[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    return found, at


def write(path: Path, tensors: Tensors) -> Path:
    """A sparse file: header, then a hole of the data's size."""
    found, nbytes = header(tensors)
    return write_raw(path, json.dumps(found).encode(), nbytes)


def write_raw(path: Path, text: bytes, data_bytes: int, length: int | None = None) -> Path:
    """With a header of these bytes; `length`: what the file says its length is."""
    with path.open("wb") as file:
        file.write((len(text) if length is None else length).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data_bytes)
    return path
