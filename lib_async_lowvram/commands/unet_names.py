"""How checkpoints name the layers of a Stable Diffusion UNet, and where in a file one lies.

Problem: the same network comes under several sets of names: the original ones (LDM, which the WebUI uses: SD1.x, SD2.x, SDXL),
diffusers', and those of our own `bench/unet.py`, which has LDM's blocks with names of its own inside. `Names` tells, for each,
what the parts of a residual block and of a transformer are called; `find` decides which it is.

Pure; no torch. Called by `unet_walk`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lib_async_lowvram.safetensors_header import TensorInfo, shown


class NoUnet(ValueError):
    """No UNet that could be planned for; one line that says what there is instead."""


@dataclass(frozen=True)
class Attention:
    """Layers of one attention, in the order in which they run: query, key, value; then, behind the attention itself, out."""

    norm: str
    query: str
    key: str
    value: str
    out: str


@dataclass(frozen=True)
class Names:
    """Names of layers, each relative to the block it is in.

    Attributes:
        title: for people.
        vectors: the embeddings of timestep and label, those that there are.
        residual: norm, convolution, time embedding, norm, convolution; skip: the convolution where channels change.
        blocks: the name under which a transformer's blocks are numbered.
        self_attention, cross_attention, norm_ff, wide, narrow: of one transformer block.
    """

    title: str
    vectors: tuple[str, ...]
    residual: tuple[str, str, str, str, str]
    skip: str
    blocks: str
    self_attention: Attention
    cross_attention: Attention
    norm_ff: str
    wide: str
    narrow: str


def _attention(norm: str, base: str, out: str) -> Attention:
    return Attention(norm, f"{base}.to_q", f"{base}.to_k", f"{base}.to_v", f"{base}.{out}")


_STANDARD = {
    "blocks": "transformer_blocks",
    "self_attention": _attention("norm1", "attn1", "to_out.0"),
    "cross_attention": _attention("norm2", "attn2", "to_out.0"),
    "norm_ff": "norm3",
    "wide": "ff.net.0.proj",
    "narrow": "ff.net.2",
}
_LDM_VECTORS = ("time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "label_emb.0", "label_emb.2")

LDM = Names(
    title="LDM (as in the WebUI)",
    vectors=_LDM_VECTORS,
    residual=("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"),
    skip="skip_connection",
    **_STANDARD,
)
DIFFUSERS = Names(
    title="diffusers",
    vectors=(
        *("time_embedding.linear_1", "time_embedding.linear_2", "class_embedding.linear_1", "class_embedding.linear_2"),
        *("add_embedding.linear_1", "add_embedding.linear_2"),
    ),
    residual=("norm1", "conv1", "time_emb_proj", "norm2", "conv2"),
    skip="conv_shortcut",
    **_STANDARD,
)
BENCH = Names(
    title="bench/unet.py",
    vectors=_LDM_VECTORS,
    residual=("norm_in", "conv_in", "time", "norm_out", "conv_out"),
    skip="skip",
    blocks="blocks",
    self_attention=_attention("norm_self", "attn_self", "to_out"),
    cross_attention=_attention("norm_cross", "attn_cross", "to_out"),
    norm_ff="norm_ff",
    wide="ff.wide",
    narrow="ff.narrow",
)

# Only together do these mean a UNet: a ControlNet has the first ones too, and an autoencoder has down_blocks.
_MARKS = {
    "time_embed.0.weight": ("input_blocks.0.0.weight", "middle_block.0.", "output_blocks.0.0.", "out.2.weight"),
    "time_embedding.linear_1.weight": ("conv_in.weight", "down_blocks.0.", "up_blocks.0.", "conv_out.weight"),
}
_PREFERRED = ("model.diffusion_model.", "")
_MOST_CANDIDATES = 16

_OTHERS = (
    ("lora_unet_", "a LoRA"),
    ("lora_te", "a LoRA"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("model.diffusion_model.joint_blocks.", "a transformer (SD3), which has no UNet"),
    ("model.diffusion_model.double_blocks.", "a transformer (Flux), which has no UNet"),
    ("double_blocks.", "a transformer (Flux), which has no UNet"),
    ("joint_blocks.", "a transformer (SD3), which has no UNet"),
    ("transformer_blocks.", "a transformer, which has no UNet"),
    ("encoder.", "an encoder, perhaps a VAE"),
    ("first_stage_model.", "a VAE"),
    ("text_model.", "a text encoder"),
)


def find(tensors: Mapping[str, TensorInfo]) -> tuple[str, Names]:
    """(prefix of the UNet's tensors, how its layers are named). Raises `NoUnet`."""
    candidates = [(name[: -len(mark)], mark) for mark in _MARKS for name in tensors if name == mark or name.endswith(f".{mark}")]
    candidates.sort(key=lambda each: (_PREFERRED.index(each[0]) if each[0] in _PREFERRED else len(_PREFERRED), each))
    for prefix, mark in candidates[:_MOST_CANDIDATES]:
        if _all_start(tensors, prefix, _MARKS[mark]):
            break
    else:
        raise NoUnet(f"no UNet inside: {_what_there_is(tensors)}")
    if mark == "time_embedding.linear_1.weight":
        return prefix, DIFFUSERS
    block = f"{prefix}middle_block.0."
    names = [names for names in (LDM, BENCH) if f"{block}{names.residual[0]}.weight" in tensors]
    if not names:
        raise NoUnet(f"the UNet's residual blocks have unknown names, as in {shown(next(n for n in tensors if n.startswith(block)))}")
    return prefix, names[0]


def _all_start(tensors: Mapping[str, TensorInfo], prefix: str, starts: tuple[str, ...]) -> bool:
    return all(any(name.startswith(prefix + start) for name in tensors) for start in starts)


def _what_there_is(tensors: Mapping[str, TensorInfo]) -> str:
    if not tensors:
        return "it holds no tensors at all"
    for start, what in _OTHERS:
        if any(name.startswith(start) for name in tensors):
            return f"it looks like {what} ({len(tensors)} tensors)"
    return f"it holds {len(tensors)} tensors, such as {shown(next(iter(tensors)))}"
