"""Checkpoints with seeded random weights, in the LDM code's naming, written tensor by tensor: `python -m tests.standalone.make_checkpoint`.

Problem: real models cannot be had here, and what is shown with small ones says nothing about memory. These have the shapes and names of
the real ones; weights are normal with a variance that keeps values from growing or vanishing. Nothing as large as the file is ever in
memory. Not part of the test suite but for its small families.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from lib_async_lowvram.standalone.families import FAMILIES, UNET, VAE, Family, TextEncoder

Shapes = Iterator[tuple[str, tuple[int, ...]]]
NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}


def _both(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", (shape[0],)


def _conv(name: str, into: int, out: int, kernel: int = 3) -> Shapes:
    yield from _both(name, out, into, kernel, kernel)


def _res(name: str, into: int, out: int, time: int) -> Shapes:
    yield from _both(f"{name}.in_layers.0", into)
    yield from _conv(f"{name}.in_layers.2", into, out)
    yield from _both(f"{name}.emb_layers.1", out, time)
    yield from _both(f"{name}.out_layers.0", out)
    yield from _conv(f"{name}.out_layers.3", out, out)
    if into != out:
        yield from _conv(f"{name}.skip_connection", into, out, 1)


def _transformer(name: str, width: int, context: int, depth: int, linear: bool) -> Shapes:
    kernel = () if linear else (1, 1)
    yield from _both(f"{name}.norm", width)
    yield from _both(f"{name}.proj_in", width, width, *kernel)
    for number in range(depth):
        block = f"{name}.transformer_blocks.{number}"
        for attention, into in (("attn1", width), ("attn2", context)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, into)
            yield f"{block}.{attention}.to_v.weight", (width, into)
            yield from _both(f"{block}.{attention}.to_out.0", width, width)
        yield from _both(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _both(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _both(f"{block}.{norm}", width)
    yield from _both(f"{name}.proj_out", width, width, *kernel)


def unet_shapes(family: Family) -> Shapes:
    """Without the prefix."""
    config = family.unet
    widths, blocks, context = config["block_out_channels"], config["layers_per_block"], config["cross_attention_dim"]
    depths = config.get("transformer_layers_per_block", 1)
    depths = (depths,) * len(widths) if isinstance(depths, int) else depths
    depths_of = [depth if kind.startswith("CrossAttn") else 0 for depth, kind in zip(depths, config["down_block_types"], strict=True)]
    linear, time, first = config.get("use_linear_projection", False), 4 * widths[0], widths[0]
    yield from _both("time_embed.0", time, first)
    yield from _both("time_embed.2", time, time)
    if family.text_time:
        yield from _both("label_emb.0.0", time, config["projection_class_embeddings_input_dim"])
        yield from _both("label_emb.0.2", time, time)
    yield from _conv("input_blocks.0.0", config["in_channels"], first)
    skips, width, number = [first], first, 1
    for level, (out, depth) in enumerate(zip(widths, depths_of, strict=True)):
        for _ in range(blocks):
            yield from _res(f"input_blocks.{number}.0", width, out, time)
            if depth:
                yield from _transformer(f"input_blocks.{number}.1", out, context, depth, linear)
            width, number = out, number + 1
            skips.append(width)
        if level < len(widths) - 1:
            yield from _conv(f"input_blocks.{number}.0.op", width, width)
            skips.append(width)
            number += 1
    yield from _res("middle_block.0", width, width, time)
    yield from _transformer("middle_block.1", width, context, depths[-1], linear)
    yield from _res("middle_block.2", width, width, time)
    number = 0
    for level in reversed(range(len(widths))):
        for place in range(blocks + 1):
            yield from _res(f"output_blocks.{number}.0", width + skips.pop(), widths[level], time)
            width = widths[level]
            if depths_of[level]:
                yield from _transformer(f"output_blocks.{number}.1", width, context, depths_of[level], linear)
            if level and place == blocks:
                yield from _conv(f"output_blocks.{number}.{2 if depths_of[level] else 1}.conv", width, width)
            number += 1
    yield from _both("out.0", width)
    yield from _conv("out.2", width, config["out_channels"])


def _vae_block(name: str, into: int, out: int) -> Shapes:
    yield from _both(f"{name}.norm1", into)
    yield from _conv(f"{name}.conv1", into, out)
    yield from _both(f"{name}.norm2", out)
    yield from _conv(f"{name}.conv2", out, out)
    if into != out:
        yield from _conv(f"{name}.nin_shortcut", into, out, 1)


def _vae_middle(name: str, width: int) -> Shapes:
    yield from _vae_block(f"{name}.mid.block_1", width, width)
    yield from _both(f"{name}.mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.mid.attn_1.{part}", width, width, 1)
    yield from _vae_block(f"{name}.mid.block_2", width, width)


def vae_shapes(family: Family) -> Shapes:
    """Without the prefix."""
    config = family.vae
    widths, blocks, latent = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    yield from _conv("encoder.conv_in", 3, widths[0])
    width = widths[0]
    for level, out in enumerate(widths):
        for place in range(blocks):
            yield from _vae_block(f"encoder.down.{level}.block.{place}", width, out)
            width = out
        if level < len(widths) - 1:
            yield from _conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from _vae_middle("encoder", width)
    yield from _both("encoder.norm_out", width)
    yield from _conv("encoder.conv_out", width, 2 * latent)
    yield from _conv("quant_conv", 2 * latent, 2 * latent, 1)
    yield from _conv("post_quant_conv", latent, latent, 1)
    yield from _conv("decoder.conv_in", latent, width)
    yield from _vae_middle("decoder", width)
    for level in reversed(range(len(widths))):
        for place in range(blocks + 1):
            yield from _vae_block(f"decoder.up.{level}.block.{place}", width, widths[level])
            width = widths[level]
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from _both("decoder.norm_out", width)
    yield from _conv("decoder.conv_out", width, 3)


def text_shapes(encoder: TextEncoder) -> Shapes:
    """Without the prefix."""
    config = encoder.config
    width, wide, words, places = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"))
    if encoder.open_clip:
        yield "positional_embedding", (places, width)
        yield "text_projection", (width, config["projection_dim"])
        yield "token_embedding.weight", (words, width)
        yield from _both("ln_final", width)
        for number in range(config["num_hidden_layers"]):
            layer = f"transformer.resblocks.{number}"
            yield f"{layer}.attn.in_proj_weight", (3 * width, width)
            yield f"{layer}.attn.in_proj_bias", (3 * width,)
            yield from _both(f"{layer}.attn.out_proj", width, width)
            for norm in ("ln_1", "ln_2"):
                yield from _both(f"{layer}.{norm}", width)
            yield from _both(f"{layer}.mlp.c_fc", wide, width)
            yield from _both(f"{layer}.mlp.c_proj", width, wide)
        return
    yield "text_model.embeddings.token_embedding.weight", (words, width)
    yield "text_model.embeddings.position_embedding.weight", (places, width)
    for number in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _both(f"{layer}.self_attn.{part}", width, width)
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _both(f"{layer}.{norm}", width)
        yield from _both(f"{layer}.mlp.fc1", wide, width)
        yield from _both(f"{layer}.mlp.fc2", width, wide)
    yield from _both("text_model.final_layer_norm", width)


def shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint."""
    found = {UNET + name: shape for name, shape in unet_shapes(family)} | {VAE + name: shape for name, shape in vae_shapes(family)}
    for encoder in family.text:
        found |= {encoder.prefix + name: shape for name, shape in text_shapes(encoder)}
    return found


def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random weights for a tensor of that name."""
    if "embedding" in name:
        return 0.3 * torch.randn(shape, generator=generator)
    if len(shape) == 1:
        # Norms' weights are about 1; biases, and norms' biases, about 0.
        return 0.1 * torch.randn(shape, generator=generator) + float(name.endswith(".weight"))
    return 0.8 / math.sqrt(math.prod(shape[1:])) * torch.randn(shape, generator=generator)


def write(path: Path, family: Family, seed: int = 0, dtype: torch.dtype = torch.float16) -> int:
    """Write the file; its bytes. Deterministic."""
    wanted = shapes(family)
    header, at = {}, 0
    for name, shape in wanted.items():
        nbytes = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in wanted.items():
            file.write(values(name, shape, generator).to(dtype).view(torch.uint8).numpy().data)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=[each.name for each in FAMILIES], default="SD1.5")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    nbytes = write(options.out, next(each for each in FAMILIES if each.name == options.family), options.seed)
    print(f"{options.out}: {nbytes} bytes")


if __name__ == "__main__":
    main()
