"""A tile's share of what a model is given beside the latent: every tensor that has the picture's extent is cut, the rest is repeated.

Problem: conditions come nested (dicts of lists of tensors), and each tensor must be understood: a prompt's embedding [batch, tokens,
width] and a size vector [batch, width] are the same for every tile, an inpainting model's mask and masked picture, or a depth map,
[batch, channels, height, width], must be cut like the latent. The WebUI hands [batch, channels, 1, 1] to models that ignore it.
Whatever is none of these would be silently misread in a tile: `CannotTile` names it.

Pure torch. Called by `tiled_denoiser`, which decides what to tell the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lib_async_lowvram.large.tiles import Tile


class CannotTile(ValueError):
    """Something in the conditions has an extent of its own; the message names it and its shape."""


def cut(value: Any, tile: Tile, latent: torch.Tensor, path: str = "cond") -> Any:
    """`value`, with every tensor cut to `tile`, a tile of `latent` [batch, channels, height, width]. Containers (dict, list, tuple) are
    new ones, what is no tensor is the same object. CannotTile as above, or for a tensor of another batch."""
    if isinstance(value, dict):
        return {key: cut(each, tile, latent, f"{path}[{key!r}]") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cut(each, tile, latent, f"{path}[{number}]") for number, each in enumerate(value))
    if not isinstance(value, torch.Tensor):
        return value
    batch, (height, width) = latent.shape[0], latent.shape[-2:]
    shape = tuple(value.shape)
    if value.dim() and value.shape[0] != batch:
        raise CannotTile(f"{path} of shape {shape} is not for a batch of {batch}")
    if value.dim() <= 3:
        return value
    if value.dim() > 4 or shape[2:] not in ((height, width), (1, 1)):
        raise CannotTile(f"{path} of shape {shape} has neither the latent's extent {height} x {width} nor none")
    return value if shape[2:] == (1, 1) and (height, width) != (1, 1) else value[..., tile.rows, tile.columns]


def join(values: Sequence[Any], path: str = "cond") -> Any:
    """Conditions of equal structure as those of one batch, in this order. Equal things that are no tensors stay one; CannotTile where
    structures, widths or such things differ, ValueError for none at all."""
    first = values[0] if values else None
    if not values:
        raise ValueError("nothing to join")
    if any(type(each) is not type(first) and not (isinstance(each, dict) and isinstance(first, dict)) for each in values):
        raise CannotTile(f"{path} is of several kinds: {sorted({type(each).__name__ for each in values})}")
    if isinstance(first, dict):
        if any(each.keys() != first.keys() for each in values):
            raise CannotTile(f"{path} has several sets of keys: {[sorted(map(str, each)) for each in values]}")
        return {key: join([each[key] for each in values], f"{path}[{key!r}]") for key in first}
    if isinstance(first, (list, tuple)):
        if any(len(each) != len(first) for each in values):
            raise CannotTile(f"{path} has several lengths: {[len(each) for each in values]}")
        return type(first)(join([each[number] for each in values], f"{path}[{number}]") for number in range(len(first)))
    if isinstance(first, torch.Tensor):
        if first.dim() == 0:
            if any(each is not first for each in values):
                raise CannotTile(f"{path} is one number for each tile")
            return first
        if any(each.shape[1:] != first.shape[1:] for each in values):
            raise CannotTile(f"{path} has several shapes: {[tuple(each.shape) for each in values]}")
        return torch.cat(list(values))
    if any(each is not first and each != first for each in values):
        raise CannotTile(f"{path} differs from tile to tile")
    return first
