"""A UNet of Stable Diffusion 1.5's shape in plain torch, as wide as one likes.

Problem: timings mean something only on the real block structure. A real UNet's weights sit in its deep blocks and its
computing in its shallow ones, so a made-up stack of equal layers would flatter any scheduler. But the demo must run on
two CPU cores, with torch alone and without a download. So this is the same tree - `time_embed`, twelve input blocks, the
middle, twelve output blocks, `out`, with residual blocks, self- and cross-attention, GEGLU, down- and upsampling - whose
width is a parameter: `sd15(320)` has exactly SD1.5's 859,520,964 parameters, `sd15(96)` about a tenth of them.

Invariant: the output reacts to every parameter. Nothing is initialised to zero (training starts from zeros, a test must
not), so a weight that is late, stale or poisoned anywhere changes the result.

Called by the demo, the benchmark and tests, on any thread; knows nothing of streams.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

MULTIPLIERS = (1, 2, 4, 4)
"""Width of each level, in units of `channels`. Each level but the first has half the height and width of the one before."""

ATTENTION_LEVELS = (0, 1, 2)
RES_BLOCKS = 2
"""Residual blocks per level on the way down; one more on the way up."""

LATENT_CHANNELS = 4
CONTEXT_TOKENS = 77
CONTEXT_WIDTH = 768
HEADS = 8


def group_count(channels: int) -> int:
    """Groups of every GroupNorm: SD's 32 where the width allows it, else the largest power of two below that leaves at
    least three channels to a group. With one channel to a group, the norm would cancel the bias of the layer before it,
    and the output would no longer react to it."""
    groups = 32
    while groups > 1 and (channels % groups or channels // groups < 3):
        groups //= 2
    return groups


class ResBlock(nn.Module):
    """Two convolutions around the addition of the time embedding, and a skip connection. [B, C, H, W] -> [B, C', H, W]."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time = nn.Linear(embedding, channels_out)
        self.norm_out = nn.GroupNorm(groups, channels_out)
        self.conv_out = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        h = h + self.time(F.silu(embedding))[:, :, None, None]
        h = self.conv_out(F.silu(self.norm_out(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Multi-head attention of [B, N, C] over `context` [B, M, D], or over itself."""

    def __init__(self, channels: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (self._split(t) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))

    @staticmethod
    def _split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """GEGLU: one half of the wide layer gates the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Linear(channels, 8 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.wide(x).chunk(2, dim=-1)
        return self.narrow(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """Self-attention over the pixels, cross-attention to the prompt, feed-forward. [B, C, H, W] -> the same."""

    def __init__(self, channels: int, context: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm_self = nn.LayerNorm(channels)
        self.attn_self = Attention(channels, channels)
        self.norm_cross = nn.LayerNorm(channels)
        self.attn_cross = Attention(channels, context)
        self.norm_ff = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        h = h + self.attn_self(self.norm_self(h))
        h = h + self.attn_cross(self.norm_cross(h), context)
        h = h + self.ff(self.norm_ff(h))
        h = h.transpose(1, 2).unflatten(2, (height, width)).contiguous()
        return x + self.proj_out(h)


class Downsample(nn.Conv2d):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Sequential):
    """What stock `--lowvram` moves as a whole: layers in a row, each given what it needs of time and prompt."""

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, context: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The UNet of SD1.5. `forward(x [B, 4, H, W], timesteps [B], context [B, 77, 768])` -> [B, 4, H, W]; height and width
    are multiples of 8."""

    def __init__(self, channels: int, context: int = CONTEXT_WIDTH) -> None:
        if channels < HEADS or channels % HEADS:
            raise ValueError(f"channels must be a positive multiple of {HEADS}, not {channels}")
        super().__init__()
        self.channels = channels
        embedding = 4 * channels
        groups = group_count(channels)

        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(LATENT_CHANNELS, channels, 3, padding=1))])
        width = channels
        skips = [width]
        for level, multiplier in enumerate(MULTIPLIERS):
            for _ in range(RES_BLOCKS):
                layers: list[nn.Module] = [ResBlock(width, multiplier * channels, embedding, groups)]
                width = multiplier * channels
                if level in ATTENTION_LEVELS:
                    layers.append(SpatialTransformer(width, context, groups))
                self.input_blocks.append(Block(*layers))
                skips.append(width)
            if level < len(MULTIPLIERS) - 1:
                self.input_blocks.append(Block(Downsample(width)))
                skips.append(width)

        self.middle_block = Block(
            ResBlock(width, width, embedding, groups),
            SpatialTransformer(width, context, groups),
            ResBlock(width, width, embedding, groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(MULTIPLIERS))):
            for repeat in range(RES_BLOCKS + 1):
                layers = [ResBlock(width + skips.pop(), multiplier * channels, embedding, groups)]
                width = multiplier * channels
                if level in ATTENTION_LEVELS:
                    layers.append(SpatialTransformer(width, context, groups))
                if level and repeat == RES_BLOCKS:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        embedding = self.time_embed(sinusoids(timesteps, self.channels, x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding, context)
            skips.append(x)
        x = self.middle_block(x, embedding, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding, context)
        return self.out(x)


def sinusoids(timesteps: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Timesteps [B] as cosines and sines of `width` / 2 frequencies from 1 down to 1/10000: [B, width]."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(10000.0) / half))
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def sd15(channels: int = 320, *, seed: int | None = 0, dtype: torch.dtype = torch.float32) -> UNet:
    """SD1.5's UNet, `channels` wide, on the host, for inference. `seed` None: without weights, on the meta device."""
    with torch.device("meta"):
        model = UNet(channels).to(dtype)
    model.eval().requires_grad_(False)
    if seed is not None:
        model.load_state_dict(seeded_weights(model, seed), assign=True)
        model.requires_grad_(False)
    return model


def seeded_weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights for every parameter of `model` (which may be on the meta device), drawn from `seed` alone. Layers keep the
    size of what passes through them; norms scatter around one, biases around zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            noise *= parameter[0].numel() ** -0.5
        elif name.endswith("weight"):
            noise = 1.0 + 0.1 * noise
        else:
            noise *= 0.1
        weights[name] = noise.to(parameter.dtype)
    return weights


def write_checkpoint(path: str | Path, seed: int, channels: int, dtype: torch.dtype = torch.float32) -> int:
    """Write an SD1.5-shaped UNet with seeded weights to a safetensors file. Returns the bytes of its weights."""
    weights = seeded_weights(sd15(channels, seed=None, dtype=dtype), seed)
    save_file(weights, str(path), metadata={"architecture": "sd15-unet", "channels": str(channels), "seed": str(seed)})
    return sum(t.numel() * t.element_size() for t in weights.values())


def load_checkpoint(path: str | Path) -> UNet:
    """The UNet that `write_checkpoint` wrote, on the host. Raises ValueError for a file of another kind."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("architecture") != "sd15-unet":
            raise ValueError(f"{path} was not written by write_checkpoint: its metadata say {metadata or 'nothing'}")
        weights = {name: file.get_tensor(name) for name in file.keys()}
    model = sd15(int(metadata["channels"]), seed=None, dtype=next(iter(weights.values())).dtype)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def regions(model: UNet) -> list[nn.Module]:
    """What stock `--lowvram` hooks, in the order of a pass. `out` is not among them: stock leaves it on the device."""
    return [model.time_embed, *model.input_blocks, model.middle_block, *model.output_blocks]
