"""What is run: a UNet's exact shape and inputs on a GPU, narrower ones on the simulated device.

Problem: figures of different devices must not be mixed up, and what was made smaller must be told. A `Workload` says it all:
shape, latent size, batch, dtype. On a GPU: half precision at SD's own width, 512x512 and 1024x1024 pictures. On the simulated
device: single precision, and a width and a picture that one core computes in a fraction of a second. `tiny` is smaller still.

Weights come from a seed; the host tensors are shared by all contenders' models, none of which changes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lib_async_lowvram.bench.contenders import Inputs
from lib_async_lowvram.bench.measuring import BATCH, make_inputs
from lib_async_lowvram.bench.shapes import Shape, sd15_shape, sdxl_shape
from lib_async_lowvram.bench.unet import empty_unet, seeded_weights

INPUTS = 3
"""Different inputs, used in turn."""


@dataclass(frozen=True)
class Workload:
    """`model`: as on the command line. `latent`: height and width of the latent picture, an eighth of the picture's. `batch`: of
    latent pictures in one pass; two make one picture with a negative prompt."""

    model: str
    shape: Shape
    latent: int
    batch: int
    dtype: torch.dtype

    def weights(self, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
        """On the host; drawn on `device`."""
        return seeded_weights(empty_unet(self.shape, self.dtype), seed, device)

    def inputs(self, seed: int, device: torch.device) -> list[Inputs]:
        return make_inputs(INPUTS, self.latent, seed + 1, device, self.dtype, batch=self.batch, shape=self.shape)

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "batch": self.batch,
            "latent": self.latent,
            "picture": 8 * self.latent,
            "channels": self.shape.channels,
            "dtype": str(self.dtype).removeprefix("torch."),
            "exact_shape": self.shape.channels == 320,
        }


def workload(model: str, *, simulated: bool, batch: int = BATCH) -> Workload:
    """For `model` ("tiny", "sd15", "sdxl") on the simulated device or on a GPU."""
    if model == "tiny":
        made = Workload("tiny", sd15_shape(16), 8, batch, torch.float32)
    elif model == "sd15":
        made = Workload("sd15", sd15_shape(96), 32, batch, torch.float32)
    else:
        made = Workload("sdxl", sdxl_shape(32), 32, batch, torch.float32)
    if simulated:
        return made
    if model == "tiny":
        return replace(made, dtype=torch.float16)
    if model == "sd15":
        return Workload("sd15", sd15_shape(320), 64, batch, torch.float16)
    return Workload("sdxl", sdxl_shape(320), 128, batch, torch.float16)
