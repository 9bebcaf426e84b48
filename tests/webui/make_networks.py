"""LoRA files for the end-to-end tests, made for whatever checkpoint a server has loaded.

Problem: a network file fits one architecture, and the tests must run with any. So the shapes are read from the header of the
checkpoint (safetensors), and each file gets seeded random values, in proportion to the layer's fan-in: large enough to change
the picture beyond doubt, small enough to leave a picture.

Of each file it is known which layers it patches, by network, so that tests can say how many units a change must write back.
SD1 and SD2 text encoders; the UNet of either. Needs torch and safetensors.

    python make_networks.py CHECKPOINT LORA_DIR
"""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4
STRENGTH = 0.35
UNET = "model.diffusion_model."
TEXT = ("cond_stage_model.transformer.text_model.encoder.layers.", "cond_stage_model.model.transformer.resblocks.")
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Layer:
    """One layer a network can patch. `name`: its part of the key in a network file; `unit`: the layer that travels with it."""

    name: str
    unit: str
    shape: tuple[int, ...]
    has_bias: bool
    in_text: bool


@dataclass(frozen=True)
class NetworkFile:
    """`units`: names of what it changes, by network of the mover (see `_changes`). `biases`: how many layers of the UNet get a
    bias they did not have."""

    name: str
    units: dict[str, frozenset[str]]
    biases: int = 0


def read_header(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    with checkpoint.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {key: tuple(value["shape"]) for key, value in header.items() if key != "__metadata__"}


def layers_of(checkpoint: Path) -> list[Layer]:
    header = read_header(checkpoint)
    found = []
    for key, shape in header.items():
        if key.startswith(UNET) and key.endswith(".weight"):
            layer = key.removesuffix(".weight")
            name = "lora_unet_" + layer.removeprefix(UNET).replace(".", "_")
            found.append(Layer(name, layer, shape, layer + ".bias" in header, False))
        elif key.startswith(TEXT):
            found.extend(_text_layers(key, shape, header))
    return found


def _text_layers(key: str, shape: tuple[int, ...], header: dict[str, tuple[int, ...]]) -> list[Layer]:
    """The names of a `CLIPTextModel`'s layers, which the built-in extension translates for open_clip's."""
    number, _, rest = key.split("layers.")[-1].split("resblocks.")[-1].partition(".")
    prefix = f"lora_te_text_model_encoder_layers_{number}_"
    if rest == "attn.in_proj_weight":
        each = (shape[0] // 3, shape[1])
        unit = key.removesuffix(".in_proj_weight")
        return [Layer(f"{prefix}self_attn_{part}", unit, each, True, True) for part in ATTENTION]
    if not rest.endswith(".weight") or rest.startswith("attn."):
        return []
    layer = key.removesuffix(".weight")
    name = rest.removesuffix(".weight").replace("mlp.c_fc", "mlp.fc1").replace("mlp.c_proj", "mlp.fc2").replace(".", "_")
    return [Layer(prefix + name, layer, shape, layer + ".bias" in header, True)]


# -- what a file holds for one layer -------------------------------------------------------------------------------------------
def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _fan_in(layer: Layer) -> int:
    return max(1, torch.Size(layer.shape[1:]).numel())


def low_rank(layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    kernel = layer.shape[2:]
    scale = STRENGTH / (RANK * _fan_in(layer)) ** 0.5
    return {
        "lora_up.weight": _normal(generator, layer.shape[0], RANK, *(1 for _ in kernel)) * scale,
        "lora_down.weight": _normal(generator, RANK, layer.shape[1], *kernel),
        "alpha": torch.tensor(float(RANK)),
    }


def full(layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"diff": _normal(generator, *layer.shape) * STRENGTH / _fan_in(layer) ** 0.5}


def full_with_bias(layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {**full(layer, generator), "diff_b": _normal(generator, layer.shape[0]) * STRENGTH}


def norm(layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"w_norm": _normal(generator, *layer.shape) * STRENGTH, "b_norm": _normal(generator, *layer.shape) * STRENGTH}


def norm_or_full(layer: Layer, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return (norm if len(layer.shape) == 1 else full_with_bias if layer.has_bias else full)(layer, generator)


@dataclass(frozen=True)
class Recipe:
    name: str
    seed: int
    wanted: Callable[[Layer], bool]
    content: Callable[[Layer, torch.Generator], dict[str, torch.Tensor]]


def _is_weight(layer: Layer) -> bool:
    return len(layer.shape) > 1


def _attends(layer: Layer) -> bool:
    return "transformer_blocks" in layer.name and _is_weight(layer)


def _is_block_convolution(layer: Layer) -> bool:
    return "layers_" in layer.name and len(layer.shape) == 4


RECIPES = (
    Recipe("e2e-one", 1, lambda layer: _is_weight(layer) and (layer.in_text or "transformer_blocks" in layer.name), low_rank),
    Recipe(
        "e2e-two",
        2,
        # With the 3x3 convolutions, and of the text encoder only what is not attention.
        lambda layer: (
            "mlp" in layer.name if layer.in_text else "attn1" in layer.name or ("layers_" in layer.name and len(layer.shape) == 4)
        ),
        low_rank,
    ),
    Recipe("e2e-unet", 3, lambda layer: not layer.in_text and "attn2" in layer.name and _is_weight(layer), low_rank),
    Recipe("e2e-text", 4, lambda layer: layer.in_text and "self_attn" in layer.name, low_rank),
    Recipe("e2e-bias", 5, lambda layer: not layer.in_text and _attends(layer) and not layer.has_bias, full_with_bias),
    Recipe(
        "e2e-norms",
        6,
        lambda layer: len(layer.shape) == 1 or (not layer.in_text and re.search(r"_op$|_conv$|time_embed|_out_2$", layer.name) is not None),
        norm_or_full,
    ),
)


def _changes(layer: Layer, last_block: str) -> bool:
    """Whether patching it changes a unit. Of open_clip's encoder neither the last block, which does not run ("penultimate"), nor norms,
    whose class has a `forward` of its own."""
    if layer.unit.startswith(TEXT[1]):
        return len(layer.shape) > 1 and not layer.unit.startswith(last_block)
    return True


def make_networks(checkpoint: Path, folder: Path) -> dict[str, NetworkFile]:
    """Write all files; what each changes, by its name in a prompt."""
    layers = layers_of(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    blocks = {int(layer.unit.removeprefix(TEXT[1]).split(".")[0]) for layer in layers if layer.unit.startswith(TEXT[1])}
    last_block = f"{TEXT[1]}{max(blocks, default=0)}."
    made = {}
    for recipe in RECIPES:
        generator = torch.Generator().manual_seed(recipe.seed)
        chosen = [layer for layer in layers if recipe.wanted(layer)]
        tensors = {f"{layer.name}.{part}": value for layer in chosen for part, value in recipe.content(layer, generator).items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(folder / f"{recipe.name}.safetensors"))
        changed = [layer for layer in chosen if _changes(layer, last_block)]
        units = {
            "text": frozenset(layer.unit for layer in changed if layer.in_text),
            "unet": frozenset(layer.unit for layer in changed if not layer.in_text),
        }
        added = sum(f"{layer.name}.diff_b" in tensors and not layer.has_bias for layer in chosen)
        made[recipe.name] = NetworkFile(recipe.name, units, added)
    return made


if __name__ == "__main__":
    for network in make_networks(Path(sys.argv[1]), Path(sys.argv[2])).values():
        print(network.name, {name: len(units) for name, units in network.units.items()}, "biases added:", network.biases)
