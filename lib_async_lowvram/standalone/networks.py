"""diffusers' and transformers' networks, created without memory, with parameters that lie in the checkpoint's file.

Problem: loading a model usually means its size in main memory, twice for a moment. Here modules are created on the meta device, the file's
tensors are renamed by diffusers' own converters, and each parameter becomes a tensor over the mapping. Nothing is read.

Invariants: every parameter of every network comes from the file; what a converter copies (nothing, in these families) is an error here and
not a gigabyte in memory. Parameters never require gradients.

How each network moves: the UNet in the parts that run in chunks (`chunk_roots`), so that a learning pass holds one of them; the others leaf
by leaf.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lib_async_lowvram.large import chunks
from lib_async_lowvram.network_spec import NetworkSpec, Region
from lib_async_lowvram.standalone.checkpoint import Checkpoint
from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.families import UNET, VAE, Family, TextEncoder
from lib_async_lowvram.standalone.open_clip import convert_open_clip

TEXT, DENOISE, DECODE, ENCODE = "text", "unet", "vae_decode", "vae_encode"
"""Names of the mover's networks; text encoders after the first are `text_2` and so on."""


@dataclass(frozen=True)
class Networks:
    """A model. text: as many as its family has."""

    family: Family
    unet: nn.Module
    vae: nn.Module
    text: tuple[nn.Module, ...]

    def specs(self) -> dict[str, NetworkSpec]:
        """For the mover, by name."""
        found = {text_name(number): by_leaves([encoder], span=encoder) for number, encoder in enumerate(self.text)}
        found[DENOISE] = NetworkSpec([Region(part) for part in self.parts()], self.unet, roots=[self.unet])
        found[DECODE] = by_leaves([self.vae.post_quant_conv, self.vae.decoder], span=None)
        found[ENCODE] = by_leaves([self.vae.encoder, self.vae.quant_conv], span=None)
        return found

    def parts(self) -> list[nn.Module]:
        """Of the UNet, that run in chunks."""
        limit = chunks.automatic_limit(self.unet)
        return [part for root in chunk_roots(self.unet) for part in chunks.parts(root, limit)]


def text_name(number: int) -> str:
    return TEXT if not number else f"{TEXT}_{number + 1}"


def by_leaves(modules: Iterable[nn.Module], span: nn.Module | None) -> NetworkSpec:
    """Each module that holds weights itself is a region. Buffers, whose owners hold them while other modules run, stay for a whole pass."""
    modules = list(modules)
    leaves = [leaf for module in modules for leaf in module.modules() if any(each is not None for each in leaf._parameters.values())]
    return NetworkSpec([Region(leaf) for leaf in leaves], span, roots=modules)


def chunk_roots(unet: nn.Module) -> list[nn.Module]:
    """Where `chunks.in_chunks` may look for parts: blocks and transformers of diffusers return tuples, which cannot run in chunks, and
    what lies in these returns one tensor."""
    found: list[nn.Module] = []
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        found += [block.resnets, *(getattr(block, "attentions", None) or ())]
        found += [getattr(block, name) for name in ("downsamplers", "upsamplers") if getattr(block, name, None) is not None]
    return found


def largest_leaf(modules: Iterable[nn.Module]) -> int:
    """Bytes, as stored, of the weights that one module holds itself."""
    leaves = [leaf for module in modules for leaf in module.modules()]
    return max(sum(p.numel() * p.element_size() for p in leaf.parameters(recurse=False)) for leaf in leaves)


def build(checkpoint: Checkpoint, family: Family) -> Networks:
    """All networks of a checkpoint. `CannotMake` where its weights are not those of the family."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**family.unet), AutoencoderKL(**family.vae)
    unet_weights, vae_weights = checkpoint.part(UNET), checkpoint.part(VAE)
    try:
        unet_weights = convert_ldm_unet_checkpoint(unet_weights, family.unet)
        vae_weights = convert_ldm_vae_checkpoint(vae_weights, family.vae)
    except (KeyError, AttributeError) as error:  # names that the converters count on
        raise CannotMake(f"this is not a complete {family.name} checkpoint: {type(error).__name__} {error} while it was read") from error
    _fill(unet, unet_weights, checkpoint, f"{family.name} UNet")
    _fill(vae, vae_weights, checkpoint, f"{family.name} VAE")
    text = tuple(_text_encoder(checkpoint, encoder, family) for encoder in family.text)
    return Networks(family, unet, vae, text)


def _text_encoder(checkpoint: Checkpoint, encoder: TextEncoder, family: Family) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(**encoder.config)
    with torch.device("meta"):
        module = (CLIPTextModelWithProjection if encoder.projects else CLIPTextModel)(config)
    weights = {name[len(encoder.prefix) :]: tensor for name, tensor in checkpoint.part(encoder.prefix).items()}
    if encoder.open_clip:
        weights = convert_open_clip(weights, encoder.config["hidden_size"])
    elif not any(name.startswith("text_model.") for name in weights):
        weights = {f"text_model.{name}": tensor for name, tensor in weights.items()}  # as some programs that merge models write it
    _fill(module, weights, checkpoint, f"{family.name} text encoder")
    return module


def _fill(module: nn.Module, weights: Mapping[str, torch.Tensor], checkpoint: Checkpoint, what: str) -> None:
    """Parameters over the file; buffers, which no file holds, made anew."""
    expected = dict(module.named_parameters())
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise CannotMake(f"this file has no weights for {missing[0]} of the {what}, and {len(missing) - 1} more")
    for name, parameter in expected.items():
        tensor = weights[name]
        if tensor.shape != parameter.shape:
            raise CannotMake(f"{name} is {tuple(tensor.shape)} in this file, where a {what} has {tuple(parameter.shape)}")
        if not checkpoint.in_file(tensor):
            raise AssertionError(f"{name} was copied while it was renamed")
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for name, buffer in module.named_buffers():
        if buffer.device.type != "meta":
            continue
        owner, _, leaf = name.rpartition(".")
        if leaf != "position_ids":
            raise AssertionError(f"nobody knows what the buffer {name} of the {what} holds")
        module.get_submodule(owner)._buffers[leaf] = torch.arange(buffer.shape[-1]).expand(buffer.shape)
    module.eval()
