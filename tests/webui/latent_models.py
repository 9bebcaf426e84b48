"""Models that make pictures: a UNet with an extent, prompts that are texts, inpainting's conditions; and jobs as the host makes them.

The UNet is the benchmark's, 8 channels wide, with the host's wrapper around it: SD1 takes `c_crossattn` and `c_concat` as lists, SDXL
`crossattn` and a pooled `vector`. Everything else is `tiny_models`'.
"""

from __future__ import annotations

import importlib
import zlib
from types import SimpleNamespace

import tiny_models
import torch
from torch import nn

from lib_async_lowvram.bench.shapes import sd15_shape, sdxl_shape
from lib_async_lowvram.bench.unet import empty_unet, load_unet, seeded_weights
from lib_async_lowvram.large.settings import LargePictures

TOKENS = 77


class HostUNet(nn.Module):
    """`forward(x, timesteps, context, y)` over the benchmark's UNet's own parts, which it takes over."""

    def __init__(self, shape, seed: int, more_channels: int) -> None:
        super().__init__()
        built = load_unet(shape, seeded_weights(empty_unet(shape), seed))
        self.shape = shape
        for name, part in built.named_children():
            self.add_module(name, part)
        if more_channels:
            torch.manual_seed(seed)
            self.input_blocks[0][0] = nn.Conv2d(4 + more_channels, shape.channels, 3, padding=1)

    channels = property(lambda self: self.shape.channels)

    def forward(self, x, timesteps, context, y=None):
        from lib_async_lowvram.bench.unet import UNet

        return UNet.forward(self, x, timesteps, context, y)


class Wrapper(nn.Module):
    def __init__(self, unet) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentModel(tiny_models.Model):
    """`inpainting`: five more channels, from `c_concat`."""

    def __init__(self, kind: str, seed: int, inpainting: bool) -> None:
        super().__init__(kind)
        shape = sdxl_shape(8) if kind == "sdxl" else sd15_shape(8)
        self.is_sdxl, self.inpainting, self.shape = kind == "sdxl", inpainting, shape
        self.model = Wrapper(HostUNet(shape, seed, 5 if inpainting else 0))
        self.encoded: list[str] = []

    def get_learned_conditioning(self, texts):
        """One row for each text; 77 tokens, or 154 for long ones."""
        self.encoded += texts
        tokens = torch.tensor([[zlib.crc32(text.encode()) >> shift & 31 for shift in (0, 8, 16)] for text in texts])
        row = self.condition(tokens)
        long = max(1 + (len(text) > 40) for text in texts)
        spread = torch.linspace(0.5, 1.5, TOKENS * long)[None, :, None]
        made = row.repeat(1, self.shape.context // tiny_models.WIDTH)[:, None] * spread
        if not self.is_sdxl:
            return made
        pooled = row.repeat(1, self.shape.label // tiny_models.WIDTH)
        return {"crossattn": made, "vector": pooled * (0.5 if texts.is_negative_prompt else 1)}

    def apply_model(self, x, t, cond):
        if self.inpainting:
            x = torch.cat([x, *cond["c_concat"]], 1)
        if self.is_sdxl:
            return self.model.diffusion_model(x, t, cond["crossattn"], cond["vector"])
        return self.model.diffusion_model(x, t, torch.cat(cond["c_crossattn"], 1))


def make(kind: str = "sd1", seed: int = 0, inpainting: bool = False) -> LatentModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LatentModel(kind, seed, inpainting).eval().requires_grad_(False)
        model.cond_stage_model_empty_prompt = torch.full((1, TOKENS, model.shape.context), 0.01)
        return model


class Processing(SimpleNamespace):
    """The host's object for a job, as far as it matters here."""

    def __init__(self, prompts, negative="", **more) -> None:
        super().__init__(
            prompts=[prompts] if isinstance(prompts, str) else prompts, negative=negative, steps=3, sampler_name="Euler",
            width=192, height=128, comments=[], firstpass_steps=3, is_hr_pass=False, enable_hr=False, **more,
        )  # fmt: skip

    def comment(self, text: str) -> None:
        self.comments.append(text)

    def setup_conds(self) -> None:
        parser = importlib.import_module("modules.prompt_parser")
        model = importlib.import_module("modules.sd_models").model_data.sd_model
        negatives = parser.SdConditioning([self.negative] * len(self.prompts), is_negative_prompt=True)
        self.uc = parser.get_learned_conditioning(model, negatives, self.steps)
        self.c = parser.get_multicond_learned_conditioning(model, parser.SdConditioning(self.prompts), self.steps)

    def get_conds(self):
        return self.c, self.uc


def sample(p: Processing, height: int = 16, width: int = 24, between=None) -> torch.Tensor:
    """`p.steps` steps of Euler's method over a latent of height x width cells; `between(step)` is called before each."""
    denoisers = importlib.import_module("modules.sd_samplers_cfg_denoiser")
    inpainting = importlib.import_module("modules.sd_models").model_data.sd_model.inpainting
    with torch.no_grad():
        p.setup_conds()
        generator = torch.Generator().manual_seed(5)
        batch = len(p.prompts)
        x = torch.randn(batch, 4, height, width, generator=generator) * 3
        image = torch.randn(batch, 5, height, width, generator=generator) if inpainting else torch.zeros(batch, 5, 1, 1)
        sampler = SimpleNamespace(sampler_extra_args={"cond": p.c, "uncond": p.uc})
        denoiser = denoisers.CFGDenoiser(sampler)
        denoiser.p, denoiser.total_steps = p, p.steps
        sigmas = torch.linspace(3, 0, p.steps + 1)
        for step in range(p.steps):
            if between is not None:
                between(step)
            sigma = sigmas[step].repeat(batch)
            args = sampler.sampler_extra_args
            clean = denoiser(x, sigma, uncond=args["uncond"], cond=args["cond"], cond_scale=5.0, s_min_uncond=0.0, image_cond=image)
            x = x + (x - clean) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
        return x


def small_settings(mode: str = "On", tile: int = 64, overlap: int = 16) -> LargePictures:
    """Smaller tiles than the user may ask for: these pictures are as small."""
    return LargePictures(mode, tile, overlap)
