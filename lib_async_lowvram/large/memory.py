"""How many tiles go through a UNet together, and in how many chunks: from what its activations take and what is free.

Problem: weights travel once per call of the UNet, so a call should have as many tiles as possible; what limits that is what must be
kept for all of them at once: the skip connections, and at each block what goes in and comes out. Inside a block only one chunk's
activations are there (`chunks`).

What is kept, per sample, is read from the layout that all UNets of the latent diffusion family have (input_blocks, middle_block,
output_blocks; SD1, SD2, SDXL): with a cell a place of the latent, c_i the channels and a_i the share of the latent's cells of input
block i's output, skips S = sum a_i c_i elements per cell; at output block j, with the skips S_j not yet used (its own among them),
input h_j and output o_j:

    while it is put together:   S_j + h_j + (h_j + s_j)           s_j: the skip it takes, also in S_j
    while it runs:              S_j - s_j + (h_j + s_j) + o_j

The largest of all these is the answer; for SD1.5 it is output block 9's 8 x 320 = 2560 elements per cell (5.06 x 320 at the middle):
in half precision 21 MB for a tile of 64 x 64 cells, 47 MB for one of 96 x 96. Inside a chunk: `INSIDE` times the first level's width
per cell. Both are checked against a shape-only run (tests/large/shape_run.py) in tests/large/test_memory.py.

Not counted: attention scores (fused attention has none; sliced attention takes what is free), weights, the VAE.

Pure, but for reading shapes. Bytes. Called before a picture is sampled, on any thread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

INSIDE = 22
"""Of the first level's width: elements per cell that a sample takes inside a block. GEGLU has 8 + 4 + 4 beside 3 of its input; a norm
computed in float32 of 3 widths, as at output block 9, takes 12 + 3."""


@dataclass(frozen=True)
class Kept:
    """What a UNet keeps. held, inside: elements per cell of the latent and sample, between parts and inside one. floor: the sides of a
    tile are multiples of so many cells. value_bytes: of one element."""

    held: float
    inside: float
    floor: int
    value_bytes: int

    def held_bytes(self, height: int, width: int) -> int:
        """Of one sample of height x width cells."""
        return math.ceil(self.held * height * width * self.value_bytes)

    def inside_bytes(self, height: int, width: int) -> int:
        """The same of what it takes beside that, while it is in the chunk that runs."""
        return math.ceil(self.inside * height * width * self.value_bytes)


def _convolutions(block: nn.Module) -> list[nn.Conv2d]:
    return [module for module in block.modules() if isinstance(module, nn.Conv2d)]


def kept(unet: nn.Module, value_bytes: int) -> Kept:
    """Of a UNet of that layout. ValueError, saying what is missing, for another one. Its blocks' widths are read from their
    convolutions, the last of which makes the block's output; strides tell where the picture is halved."""
    inputs, outputs = getattr(unet, "input_blocks", None), getattr(unet, "output_blocks", None)
    if not inputs or not outputs or len(inputs) != len(outputs):
        raise ValueError(f"{type(unet).__name__} has no input_blocks and output_blocks in pairs")
    scale, skips = 1, []
    for block in inputs:
        convolutions = _convolutions(block)
        if not convolutions:
            raise ValueError(f"an input block of {type(unet).__name__} has no convolution")
        scale *= math.prod(convolution.stride[0] for convolution in convolutions)
        skips.append((convolutions[-1].out_channels, scale))

    def elements(channels: int, at: int) -> float:
        return channels / at**2

    sizes = [elements(*skip) for skip in skips]
    most = max(sum(sizes[: number + 1]) + (sizes[number - 1] if number else 0.0) for number in range(len(sizes)))
    flowing = skips[-1][0]  # the middle block's output
    for number, block in enumerate(outputs):
        channels, at = skips.pop()
        left = sum(sizes[: len(skips)])
        skip, going = elements(channels, at), elements(flowing, at)
        convolutions = _convolutions(block)
        if not convolutions:
            raise ValueError(f"output block {number} of {type(unet).__name__} has no convolution")
        flowing = convolutions[-1].out_channels
        made = elements(flowing, skips[-1][1] if skips else at)
        most = max(most, left + skip + going + (going + skip), left + (going + skip) + made)
    return Kept(most, float(INSIDE * inputs[0][0].out_channels), scale, value_bytes)


@dataclass(frozen=True)
class Grouping:
    """pieces: to a call. chunks: that a call runs its parts in. needed_bytes: of activations, for one call. calls: per step."""

    pieces: int
    chunks: int
    needed_bytes: int
    calls: int


def group(kept: Kept, pieces: int, batch: int, height: int, width: int, free_bytes: int) -> Grouping:
    """For `pieces` tiles of height x width cells, each with `batch` samples (pictures, and their conditions). As few calls as
    `free_bytes` allow, of as equal sizes as may be; then as few chunks. One piece and as many chunks as samples where nothing fits:
    `needed_bytes` is more than is free then. ValueError for fewer than one of anything."""
    if min(pieces, batch, height, width) < 1:
        raise ValueError(f"{pieces} tiles of {height} x {width} cells in batches of {batch}")
    held, inside = kept.held_bytes(height, width), kept.inside_bytes(height, width)
    most = max(1, (free_bytes - inside) // (held * batch))
    calls = -(-pieces // min(most, pieces))
    together = -(-pieces // calls)
    samples = together * batch
    rows = min(samples, max(1, (free_bytes - samples * held) // inside))
    chunks = -(-samples // rows)
    return Grouping(together, chunks, samples * held + -(-samples // chunks) * inside, -(-pieces // together))
