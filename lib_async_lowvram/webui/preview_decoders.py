"""How a latent becomes a preview: the host's four methods, as functions that the preview worker may call on its own thread.

Problem: the host's `samples_to_images_tensor` reads `shared.sd_model`, which may load a model when it is read, and its "Full"
publishes the VAE's weights on the model everybody shares. So what depends on the host's present state is looked up at
submission, on the sampling thread, and what is left to the worker depends on its arguments only.

- Approx NN, TAESD: the host's own small networks, which it loads once and keeps on the device.
- Approx cheap: a linear map from latent channels to colours; its matrix is what the host's function makes of unit vectors.
- Full: the VAE's decoder as a shadow over the same masters, streamed by a mover of its own (`FullDecoder`).

Called by `webui.preview`.
"""

from __future__ import annotations

import copy
import importlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.network_spec import NetworkSpec, Region
from lib_async_lowvram.preview import Decode, NoRoom
from lib_async_lowvram.shadow import Shadow

FULL, APPROX_NN, APPROX_CHEAP, TAESD = range(4)
"""The host's `approximation_indexes`."""

FULL_BYTES_PER_PIXEL = 2048
"""Activations of a decoder at its widest, in values per pixel of the picture times two bytes: 256 channels at full size, four
tensors at a time. An estimate, doubled for values of four bytes; what is short in spite of it costs a frame."""


def network_decoder(network: nn.Module, device: torch.device, dtype: torch.dtype, scale: bool) -> Decode:
    """The host's Approx NN, or TAESD (`scale`: its output is from 0 to 1)."""

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pictures = network(latents.to(device, dtype))
        return pictures * 2 - 1 if scale else pictures

    return decode


class CheapDecoder:
    """The host's cheap approximation, whose matrix is found once per model."""

    def __init__(self) -> None:
        self._matrices: weakref.WeakKeyDictionary[nn.Module, torch.Tensor] = weakref.WeakKeyDictionary()

    def __call__(self, model: nn.Module, channels: int, approximate: Callable[[torch.Tensor], torch.Tensor]) -> Decode:
        """`approximate`: the host's function. Called here, on the sampling thread, with host tensors, once per model."""
        matrix = self._matrices.get(model)
        if matrix is None:
            matrix = self._matrices[model] = approximate(torch.eye(channels).view(channels, channels, 1, 1)).view(channels, -1)

        def decode(latents: torch.Tensor) -> torch.Tensor:
            return torch.einsum("nlxy,lr->nrxy", latents.float(), matrix.to(latents.device))

        return decode


class FullDecoder:
    """The VAE of a model, decoding on the preview thread with weights of its own stream. `mover`: the one whose masters are
    shared; it must have the VAE."""

    def __init__(self, mover: AsyncModelMover, preview_bytes: int) -> None:
        self._mover = mover
        self._streams = mover.streams.sibling()
        config = OffloadConfig(budget_bytes=preview_bytes, check_placement=mover.config.check_placement)
        self._own = AsyncModelMover(config, self._streams, host=mover.host)
        self._shadow: Shadow | None = None
        self._of: weakref.ref[nn.Module] | None = None
        self._shell: nn.Module | None = None
        self._lock = threading.Lock()  # another thread may want the device back while a new frame begins

    def decode(self, model: nn.Module, networks: list[str], latents: torch.Tensor) -> torch.Tensor:
        """One picture at a time, to keep activations small. Raises `NoRoom` where the device is too full."""
        with self._lock:
            return self._decode(model, networks, latents)

    def _decode(self, model: nn.Module, networks: list[str], latents: torch.Tensor) -> torch.Tensor:
        self._follow(model, networks)
        devices = importlib.import_module("modules.devices")
        dtype = next(self._shadow.module.parameters()).dtype
        pixels = latents.shape[-1] * latents.shape[-2] * 64
        needed = pixels * FULL_BYTES_PER_PIXEL * torch.finfo(dtype).bits // 16
        free = self._streams.free_memory()
        if free < needed:
            raise NoRoom(f"a full preview needs about {needed >> 20} MB, {free >> 20} MB are free")
        with devices.without_autocast(), self._own.running("vae"):
            return torch.cat([self._shell.decode_first_stage(latent[None].to(dtype)) for latent in latents])

    def _follow(self, model: nn.Module, networks: list[str]) -> None:
        masters = self._mover.masters(networks)
        same = self._of is not None and self._of() is model
        if same and self._shadow is not None and self._shadow.holds(lambda parameter: masters.get(id(parameter))):
            return
        self._forget()
        shadow = Shadow(model.first_stage_model, lambda parameter: masters.get(id(parameter)))
        # The model around it, with the shadow in its place and without its other networks: scale factors and the like are its.
        shell = copy.copy(model)
        shell.__dict__ = dict(model.__dict__)
        shell._modules = {"first_stage_model": shadow.module}
        leaves = [Region(module) for module in shadow.module.modules() if next(module.parameters(recurse=False), None) is not None]
        self._own.attach({"vae": NetworkSpec(leaves, span=None)})
        self._shadow, self._shell, self._of = shadow, shell, weakref.ref(model)

    def rest(self) -> None:
        """Give device memory back, and let go of the model: no frame is being decoded. The next one makes a shadow again, which
        takes no copy of weights. Waits for a frame that has begun."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._own.detach()
        self._shadow = self._shell = self._of = None

    @property
    def allocated_bytes(self) -> int:
        """Device memory of its weights."""
        return self._streams.allocated_bytes

    def status(self) -> dict[str, Any]:
        """Of its mover."""
        return self._own.status()

    def close(self) -> None:
        """Let go of the shadow, and of the streams. The worker has stopped."""
        self.rest()
        self._own.close()
        self._streams.close()
