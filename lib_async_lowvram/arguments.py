"""What a call was given: arguments that lie where the weights were are brought to where they will be; shapes tell passes apart.

Problem: the WebUI's `create_embedding` sends ids to `weight.device`, and then calls the hooked module. Between passes a
streamed weight is on the host, so the ids arrive there, and the weight on the device.

Called by the hooks' actors, before the module runs.
"""

from __future__ import annotations

import torch


def moved(args: tuple, kwargs: dict, device: torch.device) -> tuple[tuple, dict] | None:
    """The arguments with tensors on another device moved, or None where there are none."""
    if device.type == "cpu":
        return None

    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.device != device:
            break
    else:
        return None  # as nearly always

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value

    return tuple(map(move, args)), {key: move(value) for key, value in kwargs.items()}


def shape_of(args: tuple, kwargs: dict) -> tuple:
    """The shapes of all tensors given directly: passes with the same ones take equally long."""
    return tuple(tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
