"""Models in the shapes of SD1, SD2 and SDXL as the WebUI holds them, a few kilobytes each, with seeded weights.

What matters is who owns weights, who is called and who reads whom without a call: the text encoder of SD2 is never called
itself, SDXL hooks the conditioner as a whole, the VAE is used through `encode` and `decode`, `out` stays outside the blocks.
"""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.grow = nn.Linear(WIDTH, 4 * WIDTH)
        self.shrink = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shrink(torch.nn.functional.silu(self.grow(self.norm(x))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.input_blocks = nn.ModuleList(Block() for _ in range(3))
        self.middle_block = Block()
        self.output_blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.time_embed(timesteps) + context
        skips = []
        for block in self.input_blocks:
            x = block(x)
            skips.append(x)
        x = self.middle_block(x)
        for block in self.output_blocks:
            x = block(x + skips.pop())
        return self.out(x)


class DiffusionWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = UNet()

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.diffusion_model(*args)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Block()
        self.decoder = Block()
        self.loss = nn.Identity()
        self.quant_conv = nn.Linear(WIDTH, WIDTH)
        self.post_quant_conv = nn.Linear(WIDTH, WIDTH)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


class Transformer(nn.Module):
    """SD1's text transformer: called as a whole; the encoder around it uses `final` once more, after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(32, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.final = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.token_embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.final(x)


class Sd1TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer()

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.transformer.final(self.transformer(tokens)).mean(1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encode(tokens)


class OpenClip(nn.Module):
    """SD2's text model: never called; its parts are, and `positional_embedding` is read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(32, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(8, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.ln_final = nn.LayerNorm(WIDTH)


class Sd2TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = OpenClip()

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model.token_embedding(tokens)
        x = x + self.model.positional_embedding[: x.shape[1]]
        for block in self.model.blocks:
            x = block(x)
        return self.model.ln_final(x).mean(1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encode(tokens)


class Conditioner(nn.Module):
    """SDXL's two text encoders, hooked as one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedders = nn.ModuleList([Sd1TextEncoder(), Sd2TextEncoder()])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return sum(embedder.encode(tokens) for embedder in self.embedders)


class Model(nn.Module):
    """A latent diffusion model as the host sees it. `kind`: "sd1", "sd2" or "sdxl"."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.model = DiffusionWrapper()
        self.first_stage_model = Autoencoder()
        if kind == "sdxl":
            self.conditioner = Conditioner()
        else:
            self.cond_stage_model = Sd2TextEncoder() if kind == "sd2" else Sd1TextEncoder()

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        """The UNet's call for one step, as samplers make it."""
        return self.model(x, t, *cond["c_crossattn"])

    def condition(self, tokens: torch.Tensor, *, hijacked: bool = True) -> torch.Tensor:
        """`hijacked`: the host wraps text encoders in its own and never calls the one stock took for the parent."""
        if hasattr(self, "conditioner"):
            return self.conditioner(tokens)
        return self.cond_stage_model.encode(tokens) if hijacked else self.cond_stage_model(tokens)


def make(kind: str = "sd1", seed: int = 0) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(kind).eval()


def picture(
    model: Model, steps: int = 4, *, image: torch.Tensor | None = None, before_step=None, hijacked: bool = True
) -> torch.Tensor:
    """A picture, in the order of a real job: encode if there is an image, condition, sample, decode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        latent = torch.randn(2, WIDTH, generator=generator)
        if image is not None:
            latent = latent + model.first_stage_model.encode(image)
        context = model.condition(torch.tensor([[1, 2, 3], [4, 5, 6]]), hijacked=hijacked)
        for step in range(steps):
            if before_step is not None:
                before_step(step)
            latent = latent - 0.1 * model.apply_model(latent, torch.full((2, WIDTH), float(step)), {"c_crossattn": [context]})
        return model.first_stage_model.decode(latent)
