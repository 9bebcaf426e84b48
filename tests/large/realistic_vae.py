"""A VAE whose activations behave like a trained one's, without any real weights; and latents like a picture's.

The architecture is AutoencoderKL's (SD 1, 2, XL): the same modules, names and order, at a fraction of its width. Seeded weights alone would
not do: their activations have means near 0 and the same statistics everywhere, so that even a wrong group norm would be nearly right.

What makes it realistic:
- every convolution is rescaled on data, layer by layer, to an output of standard deviation 1 (for residual branches: a half), as
  training with norms keeps it;
- biases of the size of the activations: means far from 0, different for each channel, so that mean and variance both matter;
- norms with weights around 1 and biases, all different;
- latents with a spectrum of about 1/f from the whole picture's size down to single cells, and regions of their own: flat, textured, dark,
  bright. So a tile's own statistics are not the picture's.

`calibrated` gives decoder and encoder; `latents` and `pictures` what to put in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


def nonlinearity(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(into), nn.Conv2d(into, out, 3, padding=1)
        self.norm2, self.dropout, self.conv2 = norm(out), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        if into != out:
            self.nin_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x: torch.Tensor, temb: None) -> torch.Tensor:
        h = self.conv1(nonlinearity(self.norm1(x)))
        h = self.conv2(self.dropout(nonlinearity(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        # One head; at 2048 x 2048 the matrix would take 16 GB, so the fused function it is, which wants a token's values side by side.
        q, k, v = (part(h).flatten(2).transpose(1, 2).contiguous()[:, None] for part in (self.q, self.k, self.v))
        h = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(2, 3).reshape(x.shape))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1), mode="constant", value=0))


def middle(channels: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels)
    return mid


def level(channels: list[int], **more: nn.Module) -> nn.Module:
    made = nn.Module()
    made.block = nn.ModuleList(ResnetBlock(into, out) for into, out in zip(channels, channels[1:], strict=False))
    made.attn = nn.ModuleList()
    for name, module in more.items():
        setattr(made, name, module)
    return made


class Decoder(nn.Module):
    def __init__(self, width: int = 16, multiples: tuple[int, ...] = (1, 2, 4, 4), z_channels: int = 4) -> None:
        super().__init__()
        widths = [width * multiple for multiple in multiples]
        channels = widths[-1]
        self.conv_in, self.mid = nn.Conv2d(z_channels, channels, 3, padding=1), middle(channels)
        levels = []
        for number in reversed(range(len(widths))):
            out = widths[number]
            more = {"upsample": Upsample(out)} if number else {}
            levels.insert(0, level([channels, out, out, out], **more))
            channels = out
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z), None)), None)
        for each in reversed(self.up):
            for block in each.block:
                h = block(h, None)
            if hasattr(each, "upsample"):
                h = each.upsample(h)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Encoder(nn.Module):
    def __init__(self, width: int = 16, multiples: tuple[int, ...] = (1, 2, 4, 4), z_channels: int = 4) -> None:
        super().__init__()
        widths = [width * multiple for multiple in multiples]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        levels, channels = [], width
        for number, out in enumerate(widths):
            more = {"downsample": Downsample(out)} if number < len(widths) - 1 else {}
            levels.append(level([channels, out, out], **more))
            channels = out
        self.down, self.mid = nn.ModuleList(levels), middle(channels)
        self.norm_out, self.conv_out = norm(channels), nn.Conv2d(channels, 2 * z_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for each in self.down:
            for block in each.block:
                h = block(h, None)
            if hasattr(each, "downsample"):
                h = each.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, None)), None)
        return self.conv_out(nonlinearity(self.norm_out(h)))


class Autoencoder(nn.Module):
    """As the WebUI calls it."""

    def __init__(self, width: int = 16, z_channels: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(width, z_channels=z_channels), Decoder(width, z_channels=z_channels)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1), nn.Conv2d(z_channels, z_channels, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))


def octaves(channels: int, height: int, width: int, seed: int) -> torch.Tensor:
    """(1, channels, height, width) of noise, each octave with half the next larger one's amplitude: about 1/f. Standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    total, size, amplitude = torch.zeros(1, channels, height, width), 2, 1.0
    while size <= max(height, width):
        # A seed's large structures are the same at every size of picture.
        noise = torch.randn(1, channels, size, size, generator=generator)
        total += amplitude * functional.interpolate(noise, size=(height, width), mode="bicubic", align_corners=False)
        size, amplitude = 2 * size, 0.6 * amplitude
    return total / total.std()


def regions(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(how strong texture is, how bright it is) at each place: a flat bright sky above, a dark textured foreground, a flat patch in it."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None, :]
    foreground = torch.sigmoid((y - 0.4 - 0.1 * torch.sin(6 * x)) * 40)
    patch = torch.sigmoid((0.15 - ((y - 0.75) ** 2 + (x - 0.3) ** 2).sqrt()) * 60)
    return 0.15 + 1.1 * foreground * (1 - 0.9 * patch), 1.2 - 2.0 * foreground + 1.5 * patch


def latents(height: int, width: int, channels: int = 4, seed: int = 0) -> torch.Tensor:
    """(1, channels, height, width), in latent cells."""
    texture, tone = regions(height, width)
    direction = torch.randn(1, channels, 1, 1, generator=torch.Generator().manual_seed(seed + 1))
    return octaves(channels, height, width, seed) * texture + direction * tone


def pictures(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(1, 3, height, width), about -1 to 1."""
    texture, tone = regions(height, width)
    return (0.3 * octaves(3, height, width, seed) * texture + 0.4 * tone).clamp(-1, 1)


def calibrated(width: int = 16, seed: int = 0) -> Autoencoder:
    """See the module. Deterministic; gradients off."""
    torch.manual_seed(seed)
    vae = Autoencoder(width).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.copy_(1 + 0.3 * torch.randn(module.weight.shape, generator=generator))
            module.bias.copy_(0.3 * torch.randn(module.bias.shape, generator=generator))
    with torch.no_grad():
        _rescale(vae.decoder, lambda: vae.decoder(latents(64, 64)), generator)
        _rescale(vae.encoder, lambda: vae.encoder(pictures(256, 256)), generator)
    vae.decoder.conv_out.bias.zero_()
    return vae


def _rescale(network: nn.Module, run: Callable[[], torch.Tensor], generator: torch.Generator) -> None:
    """Each convolution, when it is reached, gets the weights that give its output standard deviation 1, and a bias as large."""
    handles = []

    def hook(name: str) -> Callable:
        def after(module: nn.Conv2d, args: tuple, output: torch.Tensor) -> torch.Tensor:
            branch = name.endswith(("conv2", "proj_out"))
            spread = (0.5 if branch or name == "conv_out" else 1.0) / (output - module.bias[:, None, None]).std()
            module.weight.mul_(spread)
            module.bias.copy_((0.3 if branch else 0.7) * torch.randn(module.bias.shape, generator=generator))
            return module._conv_forward(args[0], module.weight, module.bias)

        return after

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(hook(name)))
    run()
    for handle in handles:
        handle.remove()
