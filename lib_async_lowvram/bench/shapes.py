"""The shapes of Stable Diffusion's UNets, as numbers: SD1.5's and SDXL's, as wide as one likes.

Problem: the demo, the benchmark and the tests need the same block structure at very different sizes, and SDXL's besides: no
attention on its first level, two and ten transformer blocks on the others, linear projections, heads of 64 channels, and a
label embedding (size, crop and pooled prompt) beside the timestep's.

`sd15(320)` has 859,520,964 parameters and `sdxl(320)` 2,567,463,684, as the published checkpoints. Pure; no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

LATENT_CHANNELS = 4
CONTEXT_TOKENS = 77
RES_BLOCKS = 2
"""Residual blocks per level on the way down; one more on the way up."""


@dataclass(frozen=True)
class Shape:
    """A UNet's shape.

    Attributes:
        kind: "sd15" or "sdxl". channels: width of the first level; a multiple of 8.
        multipliers: width of each level, in units of `channels`. Each level but the first has half the height and width of the
            one before.
        depths: transformer blocks in every attention of a level; 0: no attention there. middle_depth: of the middle block.
        context: width of the prompt's embedding. heads: of every attention, or 0: one for each 64 channels.
        linear: projections in and out of the transformer are linear layers, else 1x1 convolutions.
        label: width of the vector that describes the picture; 0: there is none.
    """

    kind: str
    channels: int
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle_depth: int
    context: int
    heads: int
    linear: bool
    label: int

    def __post_init__(self) -> None:
        if self.channels < 8 or self.channels % 8:
            raise ValueError(f"channels must be a positive multiple of 8, not {self.channels}")

    @property
    def embedding(self) -> int:
        """Width of the timestep's embedding."""
        return 4 * self.channels

    @property
    def groups(self) -> int:
        return group_count(self.channels)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(multiplier * self.channels for multiplier in self.multipliers)

    def heads_of(self, width: int) -> int:
        """Attention heads at `width` channels."""
        return self.heads or max(1, width // 64)

    def least_latent(self) -> int:
        """Height and width of latent pictures are multiples of this."""
        return 1 << (len(self.multipliers) - 1)

    def as_json(self) -> dict:
        return asdict(self)


def sd15_shape(channels: int = 320) -> Shape:
    return Shape("sd15", channels, (1, 2, 4, 4), (1, 1, 1, 0), 1, context=768, heads=8, linear=False, label=0)


def sdxl_shape(channels: int = 320) -> Shape:
    return Shape("sdxl", channels, (1, 2, 4), (0, 2, 10), 10, context=2048, heads=0, linear=True, label=2816)


SHAPES = {"sd15": sd15_shape, "sdxl": sdxl_shape}


def group_count(channels: int) -> int:
    """Groups of every GroupNorm: SD's 32 where the width allows it, else the largest power of two below that leaves at
    least three channels to a group. With one channel to a group, the norm would cancel the bias of the layer before it,
    and the output would no longer react to it."""
    groups = 32
    while groups > 1 and (channels % groups or channels // groups < 3):
        groups //= 2
    return groups
