"""diffusers' own pipeline on a checkpoint: what the standalone command is compared with. `python -m tests.standalone.reference FILE`
prints the largest difference at 512 x 512 (or --size) for a whole picture.

The pipeline gets everything in memory, converted to the type it computes in, and the same noise; prompts go in as tokens of the
standalone's tokenizer, since pipelines fetch theirs from a hub. Nothing else of ours is used.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lib_async_lowvram.standalone import samplers
from lib_async_lowvram.standalone.families import UNET, VAE, Family, family_of
from lib_async_lowvram.standalone.request import Request
from lib_async_lowvram.standalone.tokenizer import tokenizer


def components(path: Path, family: Family, dtype: torch.dtype) -> tuple[Any, Any, list[Any]]:
    """(UNet, VAE, text encoders), whole and in `dtype`."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_clip_checkpoint,
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
        convert_open_clip_checkpoint,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    weights = load_file(str(path))
    unet, vae = UNet2DConditionModel(**family.unet), AutoencoderKL(**family.vae)
    unet.load_state_dict(convert_ldm_unet_checkpoint({k: v for k, v in weights.items() if k.startswith(UNET)}, dict(family.unet)))
    vae.load_state_dict(convert_ldm_vae_checkpoint({k: v for k, v in weights.items() if k.startswith(VAE)}, dict(family.vae)))
    text = []
    for encoder in family.text:
        module = (CLIPTextModelWithProjection if encoder.projects else CLIPTextModel)(CLIPTextConfig(**encoder.config))
        mine = {k: v for k, v in weights.items() if k.startswith(encoder.prefix)}
        if encoder.open_clip:
            mine = convert_open_clip_checkpoint(module, mine, encoder.prefix)
        else:
            mine = convert_ldm_clip_checkpoint(mine, encoder.prefix)
        missing = module.load_state_dict(mine, strict=False).missing_keys
        assert not [name for name in missing if not name.endswith("position_ids")], missing
        text.append(module)
    return tuple(each.to(dtype).eval() for each in (unet, vae)) + ([each.to(dtype).eval() for each in text],)


@torch.no_grad()
def picture(request: Request, family: Family, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(latent [1, 4, h, w], picture [rows, columns, 3] in bytes) by `StableDiffusionPipeline` or its XL counterpart."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    from PIL import Image

    unet, vae, text = components(request.checkpoint, family, dtype)
    words = tokenizer()
    scheduler = samplers.sampler(request.sampler)

    def states(prompt: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        found, pooled = [], None
        for description, encoder in zip(family.text, text, strict=True):
            ids = torch.tensor([words.padded(prompt, description.pads_with)[0]])
            answer = encoder(ids, output_hidden_states=True)
            found.append(answer.hidden_states[-2] if family.text_time else answer[0])
            pooled = answer[0] if description.projects else None
        return torch.cat(found, -1), pooled

    generator = torch.Generator().manual_seed(request.seed)
    given: dict[str, Any] = {"num_inference_steps": request.steps, "guidance_scale": request.cfg, "generator": generator}
    if request.image is None:
        noise = torch.randn((1, 4, *request.cells), generator=generator).to(dtype)
        given |= {"latents": noise, "height": request.height, "width": request.width}
    else:
        with Image.open(request.image) as image:
            resized = image.convert("RGB").resize((request.width, request.height), Image.Resampling.LANCZOS)
        given |= {"image": resized, "strength": request.strength}
    (given["prompt_embeds"], pooled), (negative, negative_pooled) = states(request.prompt), states(request.negative_prompt)
    if request.cfg > 1:
        given["negative_prompt_embeds"] = negative
    if family.text_time:
        pipeline = StableDiffusionXLPipeline(vae, *text, None, None, unet, scheduler, add_watermarker=False)
        given["pooled_prompt_embeds"] = pooled
        if request.cfg > 1:
            given["negative_pooled_prompt_embeds"] = negative_pooled
            if not request.negative_prompt:
                given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"] = negative * 0, negative_pooled * 0
    else:
        made = StableDiffusionPipeline if request.image is None else StableDiffusionImg2ImgPipeline
        pipeline = made(vae, text[0], None, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    latent = pipeline(**given, output_type="latent").images
    decoded = vae.decode(latent / family.vae["scaling_factor"]).sample[0].float()
    return latent.float(), ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).to(torch.uint8)


def main() -> None:
    from lib_async_lowvram.safetensors_header import read_header
    from lib_async_lowvram.standalone.making import make

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sampler", default="Euler")
    parser.add_argument("--memory", type=int, default=4 << 30)
    options = parser.parse_args()
    request = Request(
        options.checkpoint, "a photo of a cat", options.size, options.size, options.steps, options.memory, sampler=options.sampler, seed=7
    )
    made = make(request, print, lambda stage, share: None)
    latent, expected = picture(request, family_of(read_header(options.checkpoint)))
    off = (made.latent - latent).abs().max().item()
    bytes_off = (made.picture.int() - expected.int()).abs()
    print(
        f"{made.tiling}, VAE {made.vae.mode}: latents of {latent.abs().max():.3f} at most differ by {off:.3g} at most; "
        f"picture {expected.float().mean():.1f} +- {expected.float().std():.1f}: bytes differ by {bytes_off.max().item()} at most, "
        f"{(bytes_off > 0).sum().item()} of {bytes_off.numel()} do"
    )


if __name__ == "__main__":
    main()
