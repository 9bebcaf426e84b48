"""What diffusers' UNet2DConditionModel keeps between its parts: `memory.Kept` for that layout (conv_in, down_blocks, mid_block, up_blocks).

It computes what the LDM family's UNets compute, but holds more: an up block is given all the skips it takes at once, and neither
those nor its input go before it returns. Per cell of the latent, with g the block's input, h_i and s_i what its i-th residual block is
made of, o_i what that makes, u what the upsampler makes, and A all the skips of this block and of those to come:

    while it is put together:   A + g + h_i + (h_i + s_i)       h_0 is g, counted once
    while it runs:              A + g + (h_i + s_i) + o_i
    upsampler:                  A + g + o + u

For SD1.5 that is up_blocks.3's first residual block: 9 x 320 elements per cell. Inside a chunk as in `memory`. Checked against a run on
shapes in tests/standalone/test_unet_memory.py.

Pure, but for reading shapes. Called before a picture is sampled.
"""

from __future__ import annotations

from torch import nn

from lib_async_lowvram.large.memory import INSIDE, Kept


def kept(unet: nn.Module, value_bytes: int) -> Kept:
    """Of a `UNet2DConditionModel`. ValueError, saying what is missing, for another layout."""
    missing = [name for name in ("conv_in", "down_blocks", "mid_block", "up_blocks") if getattr(unet, name, None) is None]
    if missing:
        raise ValueError(f"{type(unet).__name__} has no {', '.join(missing)}")
    width, scale = unet.conv_in.out_channels, 1
    skips = [float(width)]
    most = skips[0]
    for block in unet.down_blocks:
        for channels, halved in (*((_made(resnet), 1) for resnet in block.resnets), *((skip, 2) for skip in _resampled(block, "down"))):
            scale *= halved
            skips.append(channels / scale**2)
            most = max(most, sum(skips) + skips[-2])
    flowing = skips[-1]
    most = max(most, sum(skips) + 2 * flowing)
    floor = scale
    for number, block in enumerate(unet.up_blocks):
        count = len(block.resnets)
        if count > len(skips):
            raise ValueError(f"up_blocks.{number} of {type(unet).__name__} takes {count} skips, and {len(skips)} are left")
        alive = sum(skips) + flowing  # with what the block is given
        for place, resnet in enumerate(block.resnets):
            skip, made = skips.pop(), _made(resnet) / scale**2
            beside = flowing if place else 0.0
            most = max(most, alive + beside + flowing + skip, alive + flowing + skip + made)
            flowing = made
        for channels in _resampled(block, "up"):
            scale //= 2
            before, flowing = flowing, channels / scale**2
            most = max(most, alive + before + flowing)
    return Kept(most, float(INSIDE * width), floor, value_bytes)


def _made(resnet: nn.Module) -> int:
    convolution = getattr(resnet, "conv2", None)
    if not isinstance(convolution, nn.Conv2d):
        raise ValueError(f"a {type(resnet).__name__} has no conv2")
    return convolution.out_channels


def _resampled(block: nn.Module, which: str) -> list[int]:
    """Channels that its resamplers make."""
    found = getattr(block, f"{which}samplers", None) or ()
    convolutions = [getattr(each, "conv", None) for each in found]
    if not all(isinstance(each, nn.Conv2d) for each in convolutions):
        raise ValueError(f"a {type(block).__name__} resamples without a convolution")
    return [each.out_channels for each in convolutions]
