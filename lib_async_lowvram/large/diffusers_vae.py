"""The encoder and decoder of diffusers' AutoencoderKL as a list of steps, as `vae_steps` gives them for the LDM layout.

Problem: the same network has other names and another attention there: `conv_in`, `mid_block.resnets` and `mid_block.attentions`,
`up_blocks[i]` from first to last with `resnets` and `upsamplers` (an encoder's `down_blocks` with `downsamplers`), `conv_norm_out`,
`conv_act`, `conv_out`. `Untileable` for what differs: a norm that depends on more than the picture, an attention of several heads, a
forward that somebody has replaced.

The attention's projections are linear layers over positions, and a picture in bands has positions in two directions. They are the same
sums as a convolution with a kernel of one pixel, and are called as that: the layer's own call, so that whoever moves its weights
sees it, with a `forward` of its own for the length of that call.

The decoder's own forward also casts between its middle and its `up_blocks`, to the type of its weights; it is not called here, so values
keep the type they come in.

From https://github.com/huggingface/diffusers, models/autoencoders/vae.py, models/unets/unet_2d_blocks.py, models/resnet.py.
Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from torch import nn
from torch.nn import functional

from lib_async_lowvram.large.rows import Untileable
from lib_async_lowvram.large.vae_steps import DECODER, ENCODER, Step

_LEVELS = {DECODER: ("up_blocks", "upsamplers", Fraction(2)), ENCODER: ("down_blocks", "downsamplers", Fraction(1, 2))}


def kind_of(network: nn.Module) -> str | None:
    """`DECODER` or `ENCODER`; None for what has not diffusers' layout. `Untileable` for one that must be left alone."""
    for kind, (levels, _, _) in _LEVELS.items():
        if isinstance(getattr(network, levels, None), nn.ModuleList) and isinstance(getattr(network, "conv_norm_out", None), nn.GroupNorm):
            if "forward" in vars(network):
                raise Untileable(f"somebody has replaced the {kind}'s own forward")
            return kind
    return None


def steps_of(network: nn.Module) -> list[Step]:
    """Of one that `kind_of` knows."""
    kind = kind_of(network)
    return list(_decoder(network) if kind == DECODER else _encoder(network))


def _residual(name: str, block: nn.Module, scale: Fraction) -> Step:
    for part, expected in (("norm1", nn.GroupNorm), ("conv1", nn.Conv2d), ("norm2", nn.GroupNorm), ("conv2", nn.Conv2d)):
        if not isinstance(getattr(block, part, None), expected):
            raise Untileable(f"{name} has no {part} of type {expected.__name__}")
    if getattr(block, "upsample", None) is not None or getattr(block, "downsample", None) is not None:
        raise Untileable(f"{name} resamples")
    return Step(name, lambda x: block(x, None), (block.conv1.in_channels, block.conv2.out_channels), scale, reach=2)


def _middle(block: nn.Module, scale: Fraction) -> Iterator[Step]:
    resnets, attentions = list(block.resnets), list(block.attentions)
    yield _residual("mid_block.resnets.0", resnets[0], scale)
    for number, (attention, resnet) in enumerate(zip(attentions, resnets[1:], strict=True)):
        step = _residual(f"mid_block.resnets.{number + 1}", resnet, scale)
        if attention is not None:
            yield Step(f"mid_block.attentions.{number}", attention, (step.channels[0],) * 2, scale, attention=attention)
        yield step


def _levels(network: nn.Module, kind: str, scale: Fraction) -> Iterator[Step]:
    levels, resamplers, factor = _LEVELS[kind]
    for number, level in enumerate(getattr(network, levels)):
        if getattr(level, "attentions", None):
            raise Untileable(f"{levels}.{number} has attentions")
        for place, resnet in enumerate(level.resnets):
            step = _residual(f"{levels}.{number}.resnets.{place}", resnet, scale)
            yield step
        for place, resampler in enumerate(getattr(level, resamplers, None) or ()):
            convolution = getattr(resampler, "conv", None)
            if not isinstance(convolution, nn.Conv2d) or getattr(resampler, "norm", None) is not None:
                raise Untileable(f"{levels}.{number}.{resamplers}.{place} has no plain convolution")
            scale *= factor
            channels = (convolution.in_channels, convolution.out_channels)
            yield Step(f"{levels}.{number}.{resamplers}.{place}", resampler, channels, scale, factor, reach=1 if factor > 1 else 2)


def _first(network: nn.Module) -> Step:
    convolution = network.conv_in
    return Step("conv_in", convolution, (convolution.in_channels, convolution.out_channels), Fraction(1), reach=1)


def _ends(network: nn.Module, scale: Fraction) -> Step:
    norm, act, convolution = network.conv_norm_out, network.conv_act, network.conv_out
    channels = (convolution.in_channels, convolution.out_channels)
    return Step("conv_norm_out, conv_out", lambda x: convolution(act(norm(x))), channels, scale, reach=1)


def _decoder(network: nn.Module) -> Iterator[Step]:
    yield _first(network)
    yield from _middle(network.mid_block, Fraction(1))
    scale = Fraction(1)
    for step in _levels(network, DECODER, scale):
        yield step
        scale = step.scale
    yield _ends(network, scale)


def _encoder(network: nn.Module) -> Iterator[Step]:
    yield _first(network)
    scale = Fraction(1)
    for step in _levels(network, ENCODER, scale):
        yield step
        scale = step.scale
    yield from _middle(network.mid_block, scale)
    yield _ends(network, scale)


# -- attention -------------------------------------------------------------------------------------------------------------
def attention_parts(attention: nn.Module) -> dict[str, Callable[[Any], Any]] | None:
    """What `chunked_attention` calls: norm, q, k, v, proj_out, each on a picture. None for what is not diffusers' `Attention`;
    `Untileable` for one that computes something else than one head over all positions with its input added."""
    norm, out = getattr(attention, "group_norm", None), getattr(attention, "to_out", None)
    linears = [getattr(attention, name, None) for name in ("to_q", "to_k", "to_v")]
    linears.append(out[0] if isinstance(out, nn.ModuleList) and len(out) else None)
    if not isinstance(norm, nn.GroupNorm) or not all(isinstance(each, nn.Linear) for each in linears):
        return None
    plain = {"heads": 1, "residual_connection": True, "rescale_output_factor": 1, "spatial_norm": None, "norm_q": None, "norm_k": None}
    odd = [name for name, value in plain.items() if getattr(attention, name, value) != value]
    if odd:
        raise Untileable(f"an attention whose {', '.join(odd)} is not usual")
    return dict(zip(("norm", "q", "k", "v", "proj_out"), (norm, *map(as_convolution, linears)), strict=True))


def as_convolution(linear: nn.Linear) -> Callable[[Any], Any]:
    """A linear layer's call for (picture, channel, row, column), over the channels of each pixel."""

    def call(picture: Any) -> Any:
        if "forward" in vars(linear):
            raise Untileable("somebody has replaced the forward of a projection")
        linear.forward = lambda x: functional.conv2d(x, linear.weight[:, :, None, None], linear.bias)
        try:
            return linear(picture)
        finally:
            del linear.forward

    return call
