"""The encoder and decoder of an AutoencoderKL (SD 1, 2, XL as the WebUI holds them) as a list of steps.

Problem: what is computed in bands, what needs the whole picture, how large each activation is and how far each convolution reaches must
be known before anything runs. The layout is that of the LDM code and its successors: `conv_in`, `mid.block_1`, `mid.attn_1`,
`mid.block_2`, `norm_out`, `conv_out`; a decoder's `up[i]` from last to first, an encoder's `down[i]` from first to last, each with
`block[j]`, `attn[j]` (empty in the known models) and `upsample` or `downsample`. `Untileable` for anything else: a decoder of another
kind, or one whose own `forward` somebody has replaced (another extension's tiled VAE), which must be left alone.

A step is one call of a module, with the module's own arguments. Steps hold modules strongly and are made for one call.
Pure; any thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lib_async_lowvram.large.rows import Untileable

DECODER, ENCODER = "decoder", "encoder"


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        name: of the module, as in the state dict. run: what to call. attention: the module, if it looks at the whole picture; else None.
        channels: (before, after). scale: height after the step by the height that the whole list starts with.
        factor: height after by height before. reach: rows before the step, above and below, that a row after it depends on.
    """

    name: str
    run: Callable[[Any], Any]
    channels: tuple[int, int]
    scale: Fraction
    factor: Fraction = Fraction(1)
    reach: int = 0
    attention: nn.Module | None = None


def steps_of(network: nn.Module) -> list[Step]:
    """Of an encoder or a decoder."""
    return list(_decoder(network) if kind_of(network) == DECODER else _encoder(network))


def kind_of(network: nn.Module) -> str:
    """`DECODER` or `ENCODER`. `Untileable` for what is neither."""
    for kind, part in ((DECODER, "up"), (ENCODER, "down")):
        if isinstance(getattr(network, part, None), nn.ModuleList):
            if "forward" in vars(network):
                raise Untileable(f"somebody has replaced the {kind}'s own forward")
            for name in ("conv_in", "mid.block_1", "mid.attn_1", "mid.block_2", "norm_out", "conv_out"):
                _part(network, name)
            return kind
    raise Untileable(f"{type(network).__name__} has neither `up` nor `down`")


def _part(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise Untileable(f"{type(network).__name__} has no {name}") from error


def _block(block: nn.Module) -> Callable[[Any], Any]:
    """A residual block is given the embedding of a time that no VAE has."""
    parameters = list(inspect.signature(block.forward).parameters.values())
    more = len(parameters) > 1 or any(each.kind is each.VAR_POSITIONAL for each in parameters)
    return (lambda x: block(x, None)) if more else block


def _channels(module: nn.Module) -> tuple[int, int]:
    """Of a residual block, by its convolutions."""
    into, out = getattr(module, "conv1", None), getattr(module, "conv2", None)
    if not isinstance(into, nn.Conv2d) or not isinstance(out, nn.Conv2d):
        raise Untileable(f"a {type(module).__name__} without conv1 and conv2")
    return into.in_channels, out.out_channels


def _residual(name: str, module: nn.Module, scale: Fraction) -> Step:
    return Step(name, _block(module), _channels(module), scale, reach=2)


def _attention(name: str, module: nn.Module, channels: int, scale: Fraction) -> Iterator[Step]:
    if not isinstance(module, nn.Identity):
        yield Step(name, module, (channels, channels), scale, attention=module)


def _middle(network: nn.Module, scale: Fraction) -> Iterator[Step]:
    first = _residual("mid.block_1", _part(network, "mid.block_1"), scale)
    yield first
    yield from _attention("mid.attn_1", _part(network, "mid.attn_1"), first.channels[1], scale)
    yield _residual("mid.block_2", _part(network, "mid.block_2"), scale)


def _level(level: nn.Module, name: str, scale: Fraction) -> Iterator[Step]:
    for number, block in enumerate(level.block):
        step = _residual(f"{name}.block.{number}", block, scale)
        yield step
        if len(level.attn):
            yield from _attention(f"{name}.attn.{number}", level.attn[number], step.channels[1], scale)


def _ends(network: nn.Module, scale: Fraction) -> Iterator[Step]:
    norm, convolution = network.norm_out, network.conv_out

    # Between norm and convolution the network's own forward calls a function of its own file, which the host may have replaced.
    nonlinearity = getattr(type(network).forward, "__globals__", {}).get("nonlinearity", functional.silu)

    def out(x: Any) -> Any:
        return convolution(nonlinearity(norm(x)))

    yield Step("norm_out, conv_out", out, (convolution.in_channels, convolution.out_channels), scale, reach=1)


def _first(network: nn.Module, scale: Fraction) -> Step:
    convolution = network.conv_in
    return Step("conv_in", convolution, (convolution.in_channels, convolution.out_channels), scale, reach=1)


def _decoder(network: nn.Module) -> Iterator[Step]:
    scale = Fraction(1)
    yield _first(network, scale)
    yield from _middle(network, scale)
    for number in reversed(range(len(network.up))):
        level = network.up[number]
        channels = 0
        for step in _level(level, f"up.{number}", scale):
            yield step
            channels = step.channels[1]
        if number:
            scale *= 2
            yield Step(f"up.{number}.upsample", _part(level, "upsample"), (channels, channels), scale, Fraction(2), reach=1)
    if getattr(network, "give_pre_end", False):
        return
    yield from _ends(network, scale)
    if getattr(network, "tanh_out", False):
        out = network.conv_out.out_channels
        yield Step("tanh", torch.tanh, (out, out), scale)


def _encoder(network: nn.Module) -> Iterator[Step]:
    scale = Fraction(1)
    yield _first(network, scale)
    for number in range(len(network.down)):
        level = network.down[number]
        channels = 0
        for step in _level(level, f"down.{number}", scale):
            yield step
            channels = step.channels[1]
        if number < len(network.down) - 1:
            scale /= 2
            yield Step(f"down.{number}.downsample", _part(level, "downsample"), (channels, channels), scale, Fraction(1, 2), reach=2)
    yield from _middle(network, scale)
    yield from _ends(network, scale)
