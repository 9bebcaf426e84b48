"""Arguments that lie where the weights were: brought to where they will be.

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

    def move(value: object) -> object:
        return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value

    if not any(isinstance(value, torch.Tensor) and value.device != device for value in (*args, *kwargs.values())):
        return None
    return tuple(map(move, args)), {key: move(value) for key, value in kwargs.items()}
