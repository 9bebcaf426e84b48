"""Every random generator that may be drawn from inside a UNet pass, as it is now; and back to that.

Problem: a pass that is repeated must draw the same numbers. Layers and scripts draw from torch's generators, of the host and of the
device (ControlNet's reference mode, dropout in somebody's adapter), from Python's and numpy's, from the WebUI's own imitation of
NVIDIA's (`modules.rng`); token merging (tomesd) has a generator for each UNet, Hypertile one for its tiles. A sampler's own noise is
drawn between passes.

Costs some ten microseconds a pass, and no wait: a device's generator keeps its state on the host. Called on the thread that
computes, where generators are used.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

PutBack = Callable[[], None]


def random_state(unet: nn.Module | None, device: torch.device) -> PutBack:
    """What puts every generator back to where it is now. `device`: the one that computes."""
    found = [_torch(), _python(random), _numpy(), _nvidia(), _tiles(), _merging(unet)]
    if device.type == "cuda":
        found.append(_device(device))

    def put_back() -> None:
        for each in found:
            each()

    return put_back


def _nothing() -> None:
    pass


def _torch() -> PutBack:
    state = torch.get_rng_state()
    return lambda: torch.set_rng_state(state)


def _device(device: torch.device) -> PutBack:
    state = torch.cuda.get_rng_state(device)
    return lambda: torch.cuda.set_rng_state(state, device)


def _python(generator: Any) -> PutBack:
    """`generator`: a `random.Random`, or the module, which has one."""
    state = generator.getstate()
    return lambda: generator.setstate(state)


def _numpy() -> PutBack:
    numbers = getattr(sys.modules.get("numpy"), "random", None)
    if numbers is None:
        return _nothing
    state = numbers.get_state()
    return lambda: numbers.set_state(state)


def _nvidia() -> PutBack:
    module: Any = sys.modules.get("modules.rng")
    generator = getattr(module, "nv_rng", None)
    if not hasattr(generator, "seed") or not hasattr(generator, "offset"):
        return _nothing
    seed, offset = generator.seed, generator.offset

    def put_back() -> None:
        module.nv_rng = generator  # seeding makes a new one
        generator.seed, generator.offset = seed, offset

    return put_back


def _tiles() -> PutBack:
    generator = getattr(sys.modules.get("hypertile"), "RNG_INSTANCE", None)
    return _python(generator) if isinstance(generator, random.Random) else _nothing


def _merging(unet: nn.Module | None) -> PutBack:
    arguments = (getattr(unet, "_tome_info", None) or {}).get("args") or {}
    if "generator" not in arguments:
        return _nothing
    generator = arguments["generator"]  # made in the first pass, from torch's own
    state = generator.get_state() if generator is not None else None

    def put_back() -> None:
        arguments["generator"] = generator
        if generator is not None:
            generator.set_state(state)

    return put_back
