"""One picture, from the request to the file: which network computes when, and what each may take.

Problem: text encoder, UNet and VAE are three networks of one mover, used one after the other; each has another largest weight, and
computes in its own type, so `--memory` is shared anew before each (`shares`).

Figures of what a run took are kept in `Made`: peaks by the system's own account, bytes read from the checkpoint.

On the thread that computes, gradients off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.choose import UnsupportedDevice, open_streams
from lib_async_lowvram.device.heap import trim_heap
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.large.chunks import Hold
from lib_async_lowvram.large.tiled_vae import Report
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.standalone import denoise as denoising
from lib_async_lowvram.standalone import pictures, prompts, samplers
from lib_async_lowvram.standalone.checkpoint import Checkpoint
from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.families import Family, family_of
from lib_async_lowvram.standalone.main_memory import MainMemory, return_freed_memory
from lib_async_lowvram.standalone.networks import Networks, build, largest_leaf
from lib_async_lowvram.standalone.precision import Computing, compute_dtype
from lib_async_lowvram.standalone.process_memory import peak_bytes, resident_bytes
from lib_async_lowvram.standalone.request import CELL, Request
from lib_async_lowvram.standalone.shares import STAGING_LIMIT, Shares, split
from lib_async_lowvram.standalone.tokenizer import tokenizer

Say = Callable[[str], None]
Moved = Callable[[str, float], None]
"""(what is being done, share of it that is done)"""

OLDEST_TORCH = (2, 2)
"""Of the pinned transformers."""

PICTURE_BYTES = 16
"""Per pixel, while the VAE's result becomes a file: 3 values of 4 bytes, and 3 bytes."""


@dataclass
class Made:
    """A picture [rows, columns, 3] in bytes, its latent, and what it took.

    Attributes:
        imported_bytes: of the process before the checkpoint was opened, all imports done. peak_bytes: the most at any time; None where
            the system does not say. device_bytes: peak of the device's allocator, on a GPU.
        read_bytes, read_seconds: from the checkpoint. seconds: of each stage. peaks: main memory, the most until each stage's end.
    """

    picture: torch.Tensor | None = None
    latent: torch.Tensor | None = None
    vae: Report | None = None
    tiling: str = ""
    imported_bytes: int | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    read_bytes: int = 0
    read_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int | None] = field(default_factory=dict)


class Maker:
    """One model on one device, for one request. `say`: for what a user may want to know meanwhile. `moved`: for progress."""

    def __init__(self, request: Request, say: Say, moved: Moved, family: Family | None = None) -> None:
        """`family`: of the checkpoint; None: told from its names. `CannotMake`."""
        self.request = request
        self.say = say
        self.moved = moved
        self.words = tokenizer()
        self.made = Made(imported_bytes=resident_bytes())
        self.checkpoint = Checkpoint(request.checkpoint)
        self.family = family or family_of(self.checkpoint.tensors)
        self.networks: Networks = build(self.checkpoint, self.family)
        self.stored = next(self.networks.unet.parameters()).dtype
        streams = _streams(request.device)
        self.on_cpu = isinstance(streams, MainMemory)
        self.device = streams.device
        if self.on_cpu:
            pictures.check_spill(request.spill)
        self.dtype = compute_dtype(request.precision, self.stored, self.device.type == "cpu")
        self.streams = streams
        # On the CPU nothing is gained by pinning more than the ring.
        self.mover = AsyncModelMover(OffloadConfig(pinned_limit_bytes=STAGING_LIMIT if self.on_cpu else 0), streams)
        self.mover.host.files.append(self.checkpoint.file)
        self.mover.attach(self.networks.specs())

    def close(self) -> None:
        """Everything goes back."""
        self.mover.close()
        self.streams.close()
        self.checkpoint.file.close()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.mover.drain()
        trim_heap()
        self.made.seconds[name] = time.perf_counter() - began
        self.made.peaks[name] = peak_bytes()

    def _share(self, modules: tuple[torch.nn.Module, ...], dtype: torch.dtype, beside: int = 0) -> Shares:
        """The mover's budget for these networks is set; what is left for activations."""
        stored = next(modules[0].parameters()).dtype
        found = split(self.request.memory_bytes - beside, largest_leaf(modules), stored.itemsize, dtype.itemsize, self.on_cpu)
        self.mover.configure(replace(self.mover.config, budget_bytes=found.weights))
        return found

    def _computing(self, modules: tuple[torch.nn.Module, ...], dtype: torch.dtype) -> Callable[[], AbstractContextManager]:
        return partial(Computing, dtype) if stored_otherwise(modules, dtype) else nullcontext

    def _computing_in_chunks(self) -> tuple[Callable[[], AbstractContextManager], Hold]:
        """(around a call of the UNet, around a part's chunks)"""
        if not stored_otherwise((self.networks.unet,), self.dtype):
            return nullcontext, self.mover.holding
        mode = Computing(self.dtype)

        @contextmanager
        def hold(part: torch.nn.Module) -> Iterator[None]:
            with self.mover.holding(part), mode.keeping():
                yield

        return (lambda: mode), hold

    # -- stages --------------------------------------------------------------------------------------------------------
    def encode(self) -> prompts.Encoded:
        """The prompts."""
        with self._stage("text"):
            self._share(self.networks.text, self.dtype)
            with self._computing(self.networks.text, self.dtype)():
                found = prompts.encode(self.request, self.family, self.networks.text, self.words, self.device)
        more = found.more and {key: value.to(self.dtype) for key, value in found.more.items()}
        return prompts.Encoded(found.states.to(self.dtype), more)

    def vae_dtype(self) -> torch.dtype:
        return torch.float32 if self.family.wide_vae and self.dtype == torch.float16 else self.dtype

    def vae_room(self, half: torch.nn.Module) -> pictures.Room:
        """For one half of the VAE."""
        dtype = self.vae_dtype()
        shares = self._share((half,), dtype, PICTURE_BYTES * self.request.width * self.request.height)
        host = None if self.on_cpu else self.mover.host
        around = self._computing((self.networks.vae,), dtype)
        moved = partial(self.moved, "VAE")
        return pictures.Room(self.device, dtype, shares.activations, host, self.request.spill, self.mover.running, around, moved)

    def start(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, object]:
        """(latent that goes into the first step, timesteps, the scheduler that is set to them)"""
        request = self.request
        scheduler = samplers.sampler(request.sampler)
        scheduler.set_timesteps(request.steps)
        shape = (1, self.family.unet["in_channels"], *request.cells)
        timesteps = scheduler.timesteps
        if request.image is None:
            return torch.randn(shape, generator=generator) * scheduler.init_noise_sigma, timesteps, scheduler
        steps = min(request.steps, int(request.steps * request.strength))
        if steps < 1:
            raise CannotMake(f"a strength of {request.strength:g} of {request.steps} steps leaves no step to make")
        first = (request.steps - steps) * getattr(scheduler, "order", 1)
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        guide = pictures.read_guide(request.image, request.width, request.height)
        with self._stage("guide"):
            latent, _ = pictures.encode(self.networks, guide, generator, self.vae_room(self.networks.vae.encoder))
        noise = torch.randn(shape, generator=generator)  # after the encoder's sample, as in diffusers' pipelines
        return scheduler.add_noise(latent, noise, timesteps[:1]), timesteps, scheduler

    def denoise(self, encoded: prompts.Encoded) -> torch.Tensor:
        """The latent."""
        generator = torch.Generator().manual_seed(self.request.seed)
        latent, timesteps, scheduler = self.start(generator)
        shares = self._share((self.networks.unet,), self.dtype)
        plan = denoising.tiling(self.networks, self.request, self.dtype.itemsize, shares.activations)
        self.made.tiling = plan.describe()
        self.say(f"{self.family.name}, {self.dtype}, {self.made.tiling}; weights within {shares.weights >> 20} MB on {self.streams.name}")
        around, hold = self._computing_in_chunks()
        with self._stage("denoise"):
            return denoising.denoise(
                self.networks, self.request, scheduler, timesteps, latent, encoded, plan, generator,
                (self.device, self.dtype), around, hold, partial(self.moved, "denoising"),
            )  # fmt: skip

    def decode(self, latent: torch.Tensor) -> tuple[torch.Tensor, Report]:
        """The picture, and how it was decoded."""
        with self._stage("decode"):
            return pictures.decode(self.networks, latent, self.vae_room(self.networks.vae.decoder))


def stored_otherwise(modules: tuple[torch.nn.Module, ...], dtype: torch.dtype) -> bool:
    """Whether any weight is of another type: checkpoints may hold a UNet in half precision beside a VAE that is not."""
    return any(parameter.dtype != dtype for module in modules for parameter in module.parameters())


def _streams(device: str) -> Streams:
    try:
        return MainMemory() if device == "cpu" else open_streams(device)
    except UnsupportedDevice as error:
        raise CannotMake(str(error)) from error


@torch.no_grad()
def make(request: Request, say: Say, moved: Moved, family: Family | None = None) -> Made:
    """The picture that is asked for. `CannotMake`, and torch's out-of-memory error where even one tile is too much."""
    import_all()
    return_freed_memory()
    maker = Maker(request, say, moved, family)
    try:
        made = maker.made
        latent = made.latent = maker.denoise(maker.encode())
        say(f"decoding {request.width} x {request.height} pixels, {latent.shape[-1]} x {latent.shape[-2]} cells of {CELL}")
        made.picture, made.vae = maker.decode(latent)
        file = maker.checkpoint.file
        made.read_bytes, made.read_seconds = file.read_bytes, file.read_seconds
        made.peak_bytes = peak_bytes()
        if maker.device.type == "cuda":
            made.device_bytes = torch.cuda.max_memory_allocated(maker.device)
        return made
    finally:
        maker.close()


def import_all() -> None:
    """Everything that a picture needs, before memory is looked at. `CannotMake` where torch is too old for it."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < OLDEST_TORCH:
        raise CannotMake(f"torch {torch.__version__} is too old for transformers, {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer is needed")
    import diffusers.loaders.single_file_utils  # noqa: F401
    import PIL.Image
    import PIL.PngImagePlugin  # noqa: F401
    import tokenizers  # noqa: F401
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401

    for name in ("CLIPTextConfig", "CLIPTextModel", "CLIPTextModelWithProjection"):
        getattr(transformers, name)
