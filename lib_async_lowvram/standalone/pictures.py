"""Latents to pictures and back, within a set amount of memory: the VAE in bands, PNG files, guides.

Problem: the activations of a 2048 x 2048 decode are gigabytes. `large.tiled_vae` computes them in bands and spills what waits: on a GPU to
main memory, on the CPU to files (`large.disk_room`), because there main memory is what must not be filled.

On the thread that computes, inside the mover's passes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.large.disk_room import DiskRoom, OutOfDiskSpace
from lib_async_lowvram.large.host_room import spill_bytes
from lib_async_lowvram.large.space import OutOfHostMemory
from lib_async_lowvram.large.tiled_vae import Limits, Report, run
from lib_async_lowvram.large.vae_layouts import steps_of
from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.networks import DECODE, ENCODE, Networks

DISK_SHARE = 0.9
"""Of what is free on the disk, for activations that wait."""

ROWS = 64
"""Of a picture, converted to bytes at once."""


@dataclass(frozen=True)
class Room:
    """Where a VAE computes. device_bytes: for activations. host: of a GPU's mover; None where the device is main memory and what waits
    lies in `folder`. running: opens a pass of the mover's network of that name. around: open while it computes. moved: is told the share
    that is done."""

    device: torch.device
    dtype: torch.dtype
    device_bytes: int
    host: HostMemory | None
    folder: Path | None
    running: Callable[[str], AbstractContextManager]
    around: Callable[[], AbstractContextManager]
    moved: Callable[[float], None]


def check_spill(folder: Path | None) -> None:
    """That activations may wait there. `CannotMake`."""
    try:
        DiskRoom(folder).free_bytes()
    except OSError as error:
        raise CannotMake(f"activations that wait cannot be written to {DiskRoom(folder)}: {error.strerror or error}") from error


def _tiled(network: torch.nn.Module, x: torch.Tensor, room: Room) -> tuple[torch.Tensor, Report]:
    try:
        if room.host is not None:
            limits, disk = Limits(room.device_bytes, spill_bytes()), None
        else:
            disk = DiskRoom(room.folder)
            limits = Limits(room.device_bytes, int(DISK_SHARE * disk.free_bytes()))
        room.moved(0.0)
        found = run(network, x, limits, room.host, lambda whole: _whole(network, whole), disk, room.moved)
        room.moved(1.0)
        return found
    except OutOfHostMemory as error:
        help = "it takes more main memory" if room.host is not None else "--spill names a folder on a larger disk"
        raise CannotMake(f"the VAE: {error}; {help}") from error
    except OutOfDiskSpace as error:
        raise CannotMake(f"{error.strerror}: --spill names another folder") from error


def _whole(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Step by step: the decoder's own forward would cast values to the type that its weights are stored in."""
    for step in steps_of(network):
        x = step.run(x)
    return x


def decode(networks: Networks, latent: torch.Tensor, room: Room) -> tuple[torch.Tensor, Report]:
    """The picture [rows, columns, 3] as bytes, and how it was computed, of a latent [1, 4, h, w]. `CannotMake` where there is no room."""
    scaled = latent / networks.family.vae["scaling_factor"]
    with room.running(DECODE), room.around():
        x = networks.vae.post_quant_conv(scaled.to(device=room.device, dtype=room.dtype))
        values, report = _tiled(networks.vae.decoder, x, room)
    picture = torch.empty(*values.shape[2:], 3, dtype=torch.uint8)
    for top in range(0, picture.shape[0], ROWS):
        rows = values[0, :, top : top + ROWS].float()
        if not torch.isfinite(rows).all():
            raise CannotMake(f"the VAE overflows in {room.dtype}: --precision float32")
        picture[top : top + ROWS] = ((rows / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).to(torch.uint8).cpu()
    return picture, report


def encode(networks: Networks, picture: torch.Tensor, generator: torch.Generator, room: Room) -> tuple[torch.Tensor, Report]:
    """A latent [1, 4, h, w] (float32, on the host) of a picture [rows, columns, 3] in bytes: a sample of what the encoder describes."""
    x = (picture.permute(2, 0, 1)[None].to(torch.float32) / 127.5 - 1).to(device=room.device, dtype=room.dtype)
    with room.running(ENCODE), room.around():
        values, report = _tiled(networks.vae.encoder, x, room)
        mean, spread = networks.vae.quant_conv(values).float().cpu().chunk(2, 1)
    noise = torch.randn(mean.shape, generator=generator)
    return (mean + torch.exp(0.5 * spread.clamp(-30, 20)) * noise) * networks.family.vae["scaling_factor"], report


def read_guide(path: Path, width: int, height: int) -> torch.Tensor:
    """A picture file as [rows, columns, 3] bytes, resized. `CannotMake` where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CannotMake(f"cannot read {path}: {error}") from error
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(height, width, 3)


def save(picture: torch.Tensor, path: Path, text: str) -> None:
    """As PNG, with what it was made from in its text chunk "parameters". `CannotMake` where it cannot be written."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_itxt("parameters", text)
    height, width, _ = picture.shape
    data = memoryview(picture.flatten().numpy())
    try:
        Image.frombuffer("RGB", (width, height), data, "raw", "RGB", 0, 1).save(path, format="PNG", pnginfo=notes)
    except OSError as error:
        raise CannotMake(f"cannot write {path}: {error.strerror or error}") from error
