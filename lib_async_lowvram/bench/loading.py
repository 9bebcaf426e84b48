"""Unloading and loading all of SDXL's components: what switching between models costs (InvokeAI's table, shared/peers.md).

Problem: between two pictures a host may have to make room on the device, and bring everything back. Stock copies weights back
and forth; the mover drops what nobody changed, so unloading is only waiting for what is in flight, and loads from pinned
memory at the link's speed. How near to it?

The components are SDXL's two text encoders, UNet and VAE, layer by layer with all their parameters' exact sizes (or a fraction
of them); a layer's forward reads each of its parameters and computes next to nothing, so that a pass from an empty device is
a load. Loading is timed until the device is done with that pass.

- `stock` - `.to(device)` and `.to("cpu")` of the whole; on the simulated device the same copies through its engines.
- `async` - the mover with a budget for everything: `drain`, and the next pass.

Called by `running` on the main thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.bench.deadline import Deadline
from lib_async_lowvram.bench.devices import is_simulated, measure_link, open_for_contender
from lib_async_lowvram.bench.measuring import same_bits
from lib_async_lowvram.bench.placed import Placed
from lib_async_lowvram.bench.shapes import sdxl_shape
from lib_async_lowvram.bench.unet import empty_unet
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.streams import Streams, align
from lib_async_lowvram.mover import AsyncModelMover

SIMULATED_BANDWIDTH = 1e9
"""Bytes per second, where the link is set."""

DTYPE = torch.float16
SETTLING = 2
"""Loads that are not timed: the mover's learning pass, and its first planned one."""


class Layer(nn.Module):
    """Parameters of given lengths. Its forward adds the first and the last number of each to x [1]."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        super().__init__()
        for number, length in enumerate(lengths):
            self.register_parameter(f"p{number}", nn.Parameter(torch.empty(length, dtype=DTYPE), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for parameter in self._parameters.values():
            x = x + parameter[:1] + parameter[-1:]
        return x


@dataclass(frozen=True)
class Components:
    """Name of component -> for each of its layers, the lengths of its parameters."""

    layers: dict[str, tuple[tuple[int, ...], ...]]

    @classmethod
    def sdxl(cls, scale: float = 1.0) -> Components:
        """SDXL's, every parameter's length times `scale`."""
        exact = {
            "text_encoder": list(_clip(12, 768)),
            "text_encoder_2": [*_clip(32, 1280), (1280 * 1280,)],
            "unet": list(_unet()),
            "vae": list(_vae()),
        }
        return cls(
            {
                name: tuple(tuple(max(1, int(length * scale)) for length in lengths) for lengths in layers)
                for name, layers in exact.items()
            }
        )

    def parameters(self) -> dict[str, int]:
        """Parameters per component."""
        return {name: sum(map(sum, layers)) for name, layers in self.layers.items()}

    def build(self, seed: int, device: torch.device) -> nn.Sequential:
        """On the host, with numbers drawn on `device` that neither grow nor vanish when they are all added up."""
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Sequential(*map(Layer, layers)) for layers in self.layers.values()))
        generator = torch.Generator(device).manual_seed(seed)
        weights = {
            name: (0.01 * torch.randn(parameter.shape, generator=generator, device=device)).to(DTYPE).cpu()
            for name, parameter in model.named_parameters()
        }
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)


def _clip(count: int, width: int) -> Iterator[tuple[int, ...]]:
    """A CLIP text encoder: embeddings, `count` layers, the last norm."""
    yield (49408 * width,)
    yield (77 * width,)
    for _ in range(count):
        yield (width, width)
        yield from [(width * width, width)] * 4
        yield (width, width)
        yield (4 * width * width, 4 * width)
        yield (4 * width * width, width)
    yield (width, width)


def _unet() -> Iterator[tuple[int, ...]]:
    for module in empty_unet(sdxl_shape(), DTYPE).modules():
        lengths = tuple(parameter.numel() for parameter in module.parameters(recurse=False))
        if lengths:
            yield lengths


def _vae() -> Iterator[tuple[int, ...]]:
    """The autoencoder: widths 128, 256, 512, 512; two residual blocks per level on the way down, three on the way up."""
    widths = (128, 256, 512, 512)

    def conv(inward: int, outward: int, side: int = 3) -> tuple[int, ...]:
        return (inward * outward * side * side, outward)

    def residual(inward: int, outward: int) -> Iterator[tuple[int, ...]]:
        yield from ((inward, inward), conv(inward, outward), (outward, outward), conv(outward, outward))
        if inward != outward:
            yield conv(inward, outward, 1)

    def middle() -> Iterator[tuple[int, ...]]:
        yield from residual(512, 512)
        yield from ((512, 512), *[conv(512, 512, 1)] * 4)
        yield from residual(512, 512)

    yield conv(3, 128)
    width = 128
    for level, wide in enumerate(widths):
        for _ in range(2):
            yield from residual(width, wide)
            width = wide
        if level < 3:
            yield conv(width, width)
    yield from middle()
    yield from ((512, 512), conv(512, 8), conv(8, 8, 1), conv(4, 4, 1), conv(4, 512))
    yield from middle()
    for level, wide in enumerate(reversed(widths)):
        for _ in range(3):
            yield from residual(width, wide)
            width = wide
        if level < 3:
            yield conv(width, width)
    yield from ((128, 128), conv(128, 3))


def measure_loading(device: Streams, components: Components, rounds: int, seed: int, deadline: Deadline) -> list[dict[str, Any]]:
    """One result per contender, JSON-ready. At least one round of each, more while there is time. Raises torch's out-of-memory
    error when there is no room for all components."""
    with contextlib.ExitStack() as stack:
        model = components.build(seed, device.device)
        total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        simulated = is_simulated(device)
        bandwidth = SIMULATED_BANDWIDTH if simulated else measure_link(device)
        # Every parameter begins at a multiple of the device's alignment, and the mover adds a little.
        capacity = 2 * sum(align(parameter.numel() * parameter.element_size()) for parameter in model.parameters())
        common = {
            "components": {name: count * DTYPE.itemsize for name, count in components.parameters().items()},
            "weight_bytes": total,
            "bandwidth_bytes_per_s": bandwidth,
        }
        x = torch.zeros(1, dtype=DTYPE, device=device.device)
        found, outputs = [], []
        for name, measure in (("stock", stock_times), ("async", async_times)):
            streams = open_for_contender(device, stack, capacity, bandwidth if simulated else None)
            if simulated:
                streams.poison = False  # no real device fills freed memory, and it takes the time of a copy
            loads, unloads, output = measure(model, streams, x, max(1, rounds), deadline)
            outputs.append(output)
            found.append(
                {
                    "contender": name,
                    **common,
                    **timing(loads, unloads, total / bandwidth),
                    "bitwise_equal": same_bits(output, outputs[0]),
                }
            )
        return found


def finish(streams: Streams) -> None:
    """Wait until the device has done what the calling thread gave it."""
    streams.synchronize(streams.record(streams.current_stream()))


Times = tuple[list[float], list[float], torch.Tensor]


def stock_times(model: nn.Module, streams: Streams, x: torch.Tensor, rounds: int, deadline: Deadline) -> Times:
    """(loads, unloads, output of the last pass): `.to(device)` and a pass, `.to("cpu")`, both waited for."""
    placed = Placed([model], streams) if is_simulated(streams) else None

    def load() -> torch.Tensor:
        placed.to_device() if placed else model.to(streams.device)
        return model(x)

    def unload() -> None:
        placed.to_host(copy=True) if placed else model.to("cpu")

    return _timed(load, unload, streams, rounds, deadline)


def timing(loads: Sequence[float], unloads: Sequence[float], copying_seconds: float) -> dict[str, Any]:
    """What is told of rounds that took so many seconds each. `copying_seconds`: of all weights, at the link's rate."""
    return {
        "load_seconds": median(loads),
        "unload_seconds": median(unloads),
        "load_spread_seconds": [min(loads), max(loads)],
        "unload_spread_seconds": [min(unloads), max(unloads)],
        "rounds": len(loads),
        "share_of_link": copying_seconds / median(loads),
    }


def async_times(model: nn.Module, streams: Streams, x: torch.Tensor, rounds: int, deadline: Deadline) -> Times:
    """The same of the mover: a pass from an empty device, and `drain`."""
    everything = 2 * sum(align(parameter.numel() * parameter.element_size()) for parameter in model.parameters())
    mover = AsyncModelMover(OffloadConfig(budget_bytes=everything), streams)
    try:
        mover.attach({"sdxl": model})
        return _timed(lambda: model(x), mover.drain, streams, rounds, deadline)
    finally:
        mover.detach()


def _timed(load: Any, unload: Any, streams: Streams, rounds: int, deadline: Deadline) -> Times:
    loads: list[float] = []
    unloads: list[float] = []
    with torch.no_grad():
        for number in range(SETTLING + rounds):
            start = perf_counter()
            output = load()
            finish(streams)
            loaded = perf_counter()
            unload()
            finish(streams)
            end = perf_counter()
            if number >= SETTLING:
                loads.append(loaded - start)
                unloads.append(end - loaded)
                if deadline.left() <= 0:
                    break
    return loads, unloads, output
