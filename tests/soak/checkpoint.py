"""What a server of the soak holds: three networks of random shapes, and their twins, which nobody manages.

Used by `server` and `previewer`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lib_async_lowvram import NetworkSpec, Region
from tests.lora_double import LoraDouble
from tests.mover.chains import Chain
from tests.mover.zoo import Zoo

NAMES = ("text", "unet", "vae")


class Steps(Zoo):
    """A UNet whose blocks run in any `order`, some left out or run twice."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.order = list(range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).reshape(-1, 4, 8)
        for place in self.order:
            x = self.blocks[place](x)
        return self.out(x).sum(1)


class Checkpoint:
    """Three networks and their twins, from a seed. Attributes: nets, twins: by name."""

    def __init__(self, seed: int, lora: LoraDouble) -> None:
        blocks = random.Random(seed).choice((2, 3, 4))
        makers = {"text": lambda: Zoo(1), "unet": lambda: Steps(blocks), "vae": lambda: Chain(4)}
        self.seed = seed
        self.nets, self.twins = ({name: self._made(make, seed) for name, make in makers.items()} for _ in range(2))
        for name in NAMES:
            lora.name_layers(self.nets[name], self.twins[name])

    @staticmethod
    def _made(make: Callable[[], nn.Module], seed: int) -> Any:
        torch.manual_seed(seed)
        return make().eval()

    def specs(self) -> dict[str, NetworkSpec]:
        return {"text": self.nets["text"].spec(), "unet": self.nets["unet"].spec(), "vae": vae_spec(self.nets["vae"])}

    def both(self, name: str, action: Callable[[Any], object]) -> None:
        for net in (self.nets[name], self.twins[name]):
            action(net)


def vae_spec(net: Chain) -> NetworkSpec:
    """One region for each leaf."""
    return NetworkSpec([Region(leaf) for leaf in net.leaves], net)
