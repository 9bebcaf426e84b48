"""OpenCLIP's names for a text encoder, in terms of transformers' CLIPTextModelWithProjection; cutting views, copying nothing.

Problem: diffusers' own converter clones what it cuts out of `in_proj_weight` and transposes the projection into new memory; here weights
must stay where they are in the file. A transposed view is dense, and dense is all that the mover asks for.

Pure: tensors in, views of them out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_WHOLE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def convert_open_clip(weights: Mapping[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """`weights`: under OpenCLIP's names, without the checkpoint's prefix; `width`: of the encoder's states. What has no place in
    transformers' class (`logit_scale`) is left out."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name in _WHOLE:
            found[_WHOLE[name]] = tensor
        elif name == "text_projection":
            found["text_projection.weight"] = tensor.T
        elif name.startswith("transformer.resblocks."):
            number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            layer = f"text_model.encoder.layers.{number}"
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = rest.rpartition("_")[2]
                for place, projection in enumerate("qkv"):
                    found[f"{layer}.self_attn.{projection}_proj.{kind}"] = tensor[place * width : (place + 1) * width]
                continue
            part, _, kind = rest.rpartition(".")
            if part in _LAYER:
                found[f"{layer}.{_LAYER[part]}.{kind}"] = tensor
    return found
