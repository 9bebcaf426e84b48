"""A diffusers pipeline whose weights travel to the device while it computes: `AsyncModelMover` on the pipeline's components.

    python docs/examples/diffusers_pipeline.py --model FOLDER --budget 600 --prompt "a lighthouse at dusk" --out dusk.png
    python docs/examples/diffusers_pipeline.py --out tiny.png      # without --model: a tiny model with random weights, to try the code

Problem: `pipeline.enable_sequential_cpu_offload()` waits for each layer's copy, `enable_model_cpu_offload()` needs room for a whole UNet.
Here weights stay in main memory and are copied ahead of their use, within a budget of device memory; the picture is the same, bit for bit.

`moved` is what to copy into a program of your own; the rest makes a pipeline and a picture. Nothing is fetched: FOLDER is a model on disk,
in diffusers' layout (with `model_index.json`), of Stable Diffusion 1, 2 or XL. Needs `pip install '.[standalone]'` and torch.

On the thread that calls the pipeline. Leave out diffusers' own offloading: the mover refuses a module that somebody else moves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib_async_lowvram import AsyncModelMover, OffloadConfig


@contextmanager
def moved(pipeline: DiffusionPipeline, config: OffloadConfig, device: str | None = None) -> Iterator[AsyncModelMover]:
    """Within it, the pipeline computes on `device` ("cuda:0", "simulated"; None: the best at hand) with its weights in main memory.

    Raises `ValueError` (`claims.Refused`) where a component cannot be managed: compiled, traced, or moved by somebody else.
    """
    with AsyncModelMover(config, device) as mover:
        mover.attach(networks(pipeline))
        kind, compute = type(pipeline), mover.streams.device
        vae = getattr(pipeline, "vae", None)
        outside = [vae.post_quant_conv] if getattr(vae, "post_quant_conv", None) is not None else []
        for module in outside:
            module.to(compute)  # of the VAE, but not of its decoder: a few hundred bytes
        # A pipeline makes its latents where its first component is, and that is main memory now.
        pipeline.__class__ = type(kind.__name__, (kind,), {"_execution_device": property(lambda self: compute)})
        try:
            yield mover
        finally:
            pipeline.__class__ = kind
            for module in outside:
                module.to("cpu")


def networks(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """What runs as one pass each: every module among the components; of a VAE its decoder, since nobody calls the VAE itself."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.decoder" if name == "vae" else name: part.decoder if name == "vae" else part for name, part in modules.items()}


def tiny_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline of Stable Diffusion 1's structure, much narrower, with random weights and letters for tokens. 64 x 64 pixels."""
    torch.manual_seed(seed)
    words = letters()
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    for module in (text, unet, vae):
        module.eval()
    scheduler = EulerDiscreteScheduler(steps_offset=1)
    return StableDiffusionPipeline(vae, text, words, unet, scheduler, None, None, requires_safety_checker=False)


def letters() -> CLIPTokenizer:
    """A tokenizer that knows letters, and no words."""
    known = [chr(code) for code in range(33, 127)]
    vocabulary = [*known, *(f"{letter}</w>" for letter in known), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        names, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        names.write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}), encoding="utf-8")
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(str(names), str(merges), model_max_length=77)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="in diffusers' layout (default: a tiny one with random weights)")
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=0, metavar="MB", help="device memory for weights (default: automatic)")
    parser.add_argument("--device", help="cuda, cuda:1 ... or simulated (default: CUDA where there is one, else simulated)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.model is None:
        pipeline = tiny_pipeline()
    elif (options.model / "model_index.json").is_file():
        kind = torch.float16 if torch.cuda.is_available() and options.device != "simulated" else torch.float32
        pipeline = DiffusionPipeline.from_pretrained(options.model, torch_dtype=kind, local_files_only=True)
    else:
        print(f"error: {options.model} holds no model_index.json", file=sys.stderr)
        return 2
    with moved(pipeline, OffloadConfig(budget_bytes=options.budget << 20), options.device) as mover:
        noise = torch.Generator().manual_seed(options.seed)  # on the CPU: the same noise for every device
        picture = pipeline(options.prompt, num_inference_steps=options.steps, generator=noise).images[0]
        status = mover.status()
    for name, figures in status["networks"].items():
        weights, copied = figures["weight_bytes"] / 1e6, figures["streamed_bytes"] / 1e6
        print(f"{name}: {weights:.1f} MB of weights, {copied:.1f} MB copied ahead of their use")
    print(f"at most {status['peak_weight_bytes'] / 1e6:.1f} MB of weights on the device, not counting each network's first pass")
    picture.save(options.out)
    print(f"{options.out}: {picture.width}x{picture.height}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
