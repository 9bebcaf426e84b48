"""A UNet of Stable Diffusion's shape (1.5's or XL's) in plain torch, as wide as one likes.

Problem: timings mean something only on the real block structure. A real UNet's weights sit in its deep blocks and its
computing in its shallow ones, so a made-up stack of equal layers would flatter any scheduler. But the demo must run on
two CPU cores, with torch alone and without a download. So this is the same tree - `time_embed`, SDXL's `label_emb`, input
blocks, the middle, output blocks, `out`, with residual blocks, self- and cross-attention, GEGLU, down- and upsampling - whose
shape is a parameter (`bench/shapes.py`): `sd15(320)` has exactly SD1.5's 859,520,964 parameters, `sd15(96)` about a tenth.

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

from lib_async_lowvram.bench.shapes import LATENT_CHANNELS, RES_BLOCKS, Shape, sd15_shape


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

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (self._split(t) for t in (self.to_q(x), self.to_k(context), self.to_v(context)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(h.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """GEGLU: one half of the wide layer gates the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Linear(channels, 8 * channels)
        self.narrow = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.wide(x).chunk(2, dim=-1)
        return self.narrow(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention over the pixels, cross-attention to the prompt, feed-forward. [B, N, C] -> the same."""

    def __init__(self, channels: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(channels)
        self.attn_self = Attention(channels, channels, heads)
        self.norm_cross = nn.LayerNorm(channels)
        self.attn_cross = Attention(channels, context, heads)
        self.norm_ff = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, h: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        h = h + self.attn_self(self.norm_self(h))
        h = h + self.attn_cross(self.norm_cross(h), context)
        return h + self.ff(self.norm_ff(h))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a picture. [B, C, H, W] -> the same."""

    def __init__(self, channels: int, shape: Shape, depth: int) -> None:
        super().__init__()
        self.linear = shape.linear
        self.norm = nn.GroupNorm(shape.groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if shape.linear else nn.Conv2d(channels, channels, 1)
        heads = shape.heads_of(channels)
        self.blocks = nn.ModuleList([TransformerBlock(channels, shape.context, heads) for _ in range(depth)])
        self.proj_out = nn.Linear(channels, channels) if shape.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        h = self.proj_in(_rows(h)) if self.linear else _rows(self.proj_in(h))
        for block in self.blocks:
            h = block(h, context)
        h = _picture(self.proj_out(h), height, width) if self.linear else self.proj_out(_picture(h, height, width))
        return x + h


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H * W, C]"""
    return x.flatten(2).transpose(1, 2)


def _picture(h: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, H * W, C] -> [B, C, H, W]"""
    return h.transpose(1, 2).unflatten(2, (height, width)).contiguous()


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
    """`forward(x [B, 4, H, W], timesteps [B], context [B, 77, shape.context])` -> [B, 4, H, W]; where the shape has a label,
    that comes fourth: [B, shape.label]. Height and width are multiples of `shape.least_latent()`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        channels, embedding, groups = shape.channels, shape.embedding, shape.groups

        self.time_embed = _embedding(channels, embedding)
        if shape.label:
            self.label_emb = _embedding(shape.label, embedding)
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(LATENT_CHANNELS, channels, 3, padding=1))])
        width = channels
        skips = [width]
        levels = list(zip(shape.widths, shape.depths, strict=True))
        for level, (wide, depth) in enumerate(levels):
            for _ in range(RES_BLOCKS):
                layers: list[nn.Module] = [ResBlock(width, wide, embedding, groups)]
                width = wide
                if depth:
                    layers.append(SpatialTransformer(width, shape, depth))
                self.input_blocks.append(Block(*layers))
                skips.append(width)
            if level < len(levels) - 1:
                self.input_blocks.append(Block(Downsample(width)))
                skips.append(width)

        self.middle_block = Block(
            ResBlock(width, width, embedding, groups),
            SpatialTransformer(width, shape, shape.middle_depth),
            ResBlock(width, width, embedding, groups),
        )

        self.output_blocks = nn.ModuleList()
        for level, (wide, depth) in reversed(list(enumerate(levels))):
            for repeat in range(RES_BLOCKS + 1):
                layers = [ResBlock(width + skips.pop(), wide, embedding, groups)]
                width = wide
                if depth:
                    layers.append(SpatialTransformer(width, shape, depth))
                if level and repeat == RES_BLOCKS:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1))

    @property
    def channels(self) -> int:
        return self.shape.channels

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, label: torch.Tensor | None = None
    ) -> torch.Tensor:
        embedding = self.time_embed(sinusoids(timesteps, self.channels, x.dtype))
        if self.shape.label:
            embedding = embedding + self.label_emb(label)
        skips = []
        for block in self.input_blocks:
            x = block(x, embedding, context)
            skips.append(x)
        x = self.middle_block(x, embedding, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding, context)
        return self.out(x)


def _embedding(width: int, embedding: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))


def sinusoids(timesteps: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Timesteps [B] as cosines and sines of `width` / 2 frequencies from 1 down to 1/10000: [B, width]."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(10000.0) / half))
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def sd15(channels: int = 320, *, seed: int | None = 0, dtype: torch.dtype = torch.float32) -> UNet:
    """SD1.5's UNet, `channels` wide, on the host, for inference. `seed` None: without weights, on the meta device."""
    shape = sd15_shape(channels)
    return empty_unet(shape, dtype) if seed is None else load_unet(shape, seeded_weights(empty_unet(shape, dtype), seed))


def empty_unet(shape: Shape, dtype: torch.dtype = torch.float32) -> UNet:
    """For inference, without weights: on the meta device."""
    with torch.device("meta"):
        model = UNet(shape).to(dtype)
    return model.eval().requires_grad_(False)


def load_unet(shape: Shape, weights: dict[str, torch.Tensor]) -> UNet:
    """For inference; its parameters are these tensors, not copies of them."""
    model = empty_unet(shape, next(iter(weights.values())).dtype)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def seeded_weights(model: nn.Module, seed: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Host tensors for every parameter of `model` (which may be on the meta device), drawn from `seed` alone. Layers keep the
    size of what passes through them; norms scatter around one, biases around zero. `device`: where they are drawn; other
    numbers on a GPU than on the host, and two thousand million of them much sooner."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.dim() > 1:
            noise *= parameter[0].numel() ** -0.5
        elif name.endswith("weight"):
            noise = 1.0 + 0.1 * noise
        else:
            noise *= 0.1
        weights[name] = noise.to(parameter.dtype).cpu()
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
    return load_unet(sd15_shape(int(metadata["channels"])), weights)


def regions(model: UNet) -> list[nn.Module]:
    """What stock `--lowvram` hooks, in the order of a pass."""
    return [model.time_embed, *model.input_blocks, model.middle_block, *model.output_blocks]


def kept(model: UNet) -> list[nn.Module]:
    """What stock `--lowvram` leaves on the device: it hooks neither the label embedding nor `out`."""
    return [model.label_emb, model.out] if model.shape.label else [model.out]
