"""What `--medvram` does with the parts of a picture's model: loading and unloading each, and all of them in a picture's turn.

Problem: under `--medvram` the WebUI has one whole network on the device at a time - the text encoders, the UNet, the VAE - and copies the
one before back first. The mover drops it, and fetches the next one while the present one computes. What does a part's arrival cost, what
its leaving, and what does a picture gain?

*Regions*: as `loading`, each part by itself. *Picture*: two prompts, `UNET_PASSES` steps, one decoding, from an empty device until the
device is done. Every layer computes here, by multiplying matrices, for as long as its weights take to travel (so that there is
something for copies to hide behind, and as much of it as there are copies):

- `stock` - the part before copied back, the next one copied there, both waited for.
- `async` - the mover with a budget for everything; each network's copies begin when it is called.
- `async-ahead` - the same, told what comes next (`AsyncModelMover.expect`), when the WebUI's integration would tell it.

Called by `running` on the main thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.bench.deadline import Deadline
from lib_async_lowvram.bench.devices import is_simulated, measure_link, open_for_contender
from lib_async_lowvram.bench.loading import (
    DTYPE,
    SETTLING,
    SIMULATED_BANDWIDTH,
    Components,
    Layer,
    async_times,
    finish,
    stock_times,
    timing,
)
from lib_async_lowvram.bench.measuring import same_bits
from lib_async_lowvram.bench.placed import Placed
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.streams import Streams, align
from lib_async_lowvram.mover import AsyncModelMover

PARTS = {"text": ("text_encoder", "text_encoder_2"), "unet": ("unet",), "vae": ("vae",)}
"""Region -> its components. SDXL's text encoders are one region to the WebUI."""

PROMPTS, UNET_PASSES = 2, 4
SIDE, SIMULATED_SIDE = 2048, 128
"""Of the matrices that are multiplied."""

CONTENDERS = ("stock", "async", "async-ahead")


def measure_regions(device: Streams, components: Components, rounds: int, seed: int, deadline: Deadline) -> list[dict[str, Any]]:
    """One result per region and contender, JSON-ready; seconds, bytes. At least one round of each. Raises torch's out-of-memory error
    when there is no room for a region."""
    x = torch.zeros(1, dtype=DTYPE, device=device.device)
    bandwidth = _link(device)
    found: list[dict[str, Any]] = []
    for region, names in PARTS.items():
        model = _part(components, names).build(seed, device.device)
        total = _nbytes(model)
        reference: torch.Tensor | None = None
        for contender, measure in (("stock", stock_times), ("async", async_times)):
            with contextlib.ExitStack() as stack:
                streams = _open(device, stack, 2 * _room(model), bandwidth)
                loads, unloads, output = measure(model, streams, x, max(1, rounds), deadline)
            reference = output if reference is None else reference
            found.append(
                {
                    "contender": contender,
                    "region": region,
                    "weight_bytes": total,
                    "bandwidth_bytes_per_s": bandwidth,
                    **timing(loads, unloads, total / bandwidth),
                    "bitwise_equal": same_bits(output, reference),
                }
            )
    return found


class Busy(nn.Module):
    """A layer that also computes: `times` products of square matrices, whose sum counts for nothing in its result."""

    def __init__(self, layer: Layer, matrix: torch.Tensor, times: int) -> None:
        super().__init__()
        self.layer = layer
        self._matrix, self._times = matrix, times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self._matrix
        for _ in range(self._times):
            product = self._matrix @ product
        return self.layer(x) + 0 * product[0, :1].to(x.dtype)


def measure_pictures(device: Streams, components: Components, rounds: int, seed: int, deadline: Deadline) -> list[dict[str, Any]]:
    """One result per contender, JSON-ready. One contender after the other: movers refuse each other's modules. At least one round of each.
    Raises as `measure_regions`."""
    bandwidth = _link(device)
    matrix = _matrix(device)
    per_product = _seconds_per_product(matrix, device)
    parts = {
        region: _busy(_layers(_part(components, names), seed, device), matrix, per_product * bandwidth) for region, names in PARTS.items()
    }
    total = sum(map(_nbytes, parts.values()))
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    outputs: dict[str, torch.Tensor] = {}
    ahead: dict[str, int] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name in CONTENDERS:
            streams = _open(device, stack, 2 * sum(map(_room, parts.values())), bandwidth)
            with contextlib.ExitStack() as over:
                picture, leave, read = _contender(name, parts, streams, over)
                before = 0
                for number in range(SETTLING + max(1, rounds)):
                    if number == SETTLING:
                        before = read()
                    start = perf_counter()
                    output = picture()
                    finish(streams)
                    if number >= SETTLING:
                        times[name].append(perf_counter() - start)
                    leave()
                    finish(streams)
                    if number >= SETTLING and deadline.left() <= 0:
                        break
                outputs[name] = output
                ahead[name] = (read() - before) // len(times[name])
    return [
        {
            "contender": name,
            "weight_bytes": total,
            "bandwidth_bytes_per_s": bandwidth,
            "prompts": PROMPTS,
            "unet_passes": UNET_PASSES,
            "compute_seconds": _computing(parts, per_product),
            "seconds": median(times[name]),
            "spread_seconds": [min(times[name]), max(times[name])],
            "fetched_ahead_bytes": ahead[name],
            "rounds": len(times[name]),
            "bitwise_equal": same_bits(outputs[name], outputs[CONTENDERS[0]]),
        }
        for name in CONTENDERS
    ]


Picture = tuple[Callable[[], torch.Tensor], Callable[[], None], Callable[[], int]]


def _contender(name: str, parts: dict[str, nn.Module], streams: Streams, over: contextlib.ExitStack) -> Picture:
    """(makes a picture from an empty device, empties it, bytes that were there ahead so far)."""
    if name == "stock":
        return _stock(parts, streams)
    mover = AsyncModelMover(OffloadConfig(budget_bytes=2 * sum(map(_room, parts.values()))), streams)
    over.callback(mover.close)
    mover.attach(parts)
    tell = mover.expect if name == "async-ahead" else lambda network: None

    def picture() -> torch.Tensor:
        x = torch.zeros(1, dtype=DTYPE, device=streams.device)
        for _ in range(PROMPTS):
            tell("unet")
            x = parts["text"](x)
        for step in range(UNET_PASSES):
            if step >= UNET_PASSES - 2:  # as `webui.next_network` does
                tell("vae")
            x = parts["unet"](x)
        return parts["vae"](x)

    return picture, mover.drain, lambda: mover.status()["adopted_ahead_bytes"]


def _stock(parts: dict[str, nn.Module], streams: Streams) -> Picture:
    placed = {region: Placed([part], streams) for region, part in parts.items()} if is_simulated(streams) else {}
    here: list[str] = []

    def leave() -> None:
        for region in here:
            placed[region].to_host(copy=True) if placed else parts[region].to("cpu")
        here.clear()

    def bring(region: str) -> None:
        if region not in here:
            leave()
            placed[region].to_device() if placed else parts[region].to(streams.device)
            here.append(region)

    def picture() -> torch.Tensor:
        x = torch.zeros(1, dtype=DTYPE, device=streams.device)
        for region, passes in (("text", PROMPTS), ("unet", UNET_PASSES), ("vae", 1)):
            for _ in range(passes):
                bring(region)
                x = parts[region](x)
        return x

    return picture, leave, lambda: 0


# -- the model ---------------------------------------------------------------------------------------------------------
def _part(components: Components, names: tuple[str, ...]) -> Components:
    return Components({name: components.layers[name] for name in names})


def _layers(components: Components, seed: int, device: Streams) -> list[Layer]:
    return [module for module in components.build(seed, device.device).modules() if isinstance(module, Layer)]


def _busy(layers: list[Layer], matrix: torch.Tensor, bytes_per_product: float) -> nn.Sequential:
    """Products as evenly as whole ones can be: small layers have none, and the next one makes up for it."""
    found, nbytes, before = [], 0, 0
    for layer in layers:
        nbytes += _nbytes(layer)
        found.append(Busy(layer, matrix, round(nbytes / bytes_per_product) - before))
        before = round(nbytes / bytes_per_product)
    return nn.Sequential(*found)


def _computing(parts: dict[str, nn.Module], per_product: float) -> dict[str, float]:
    """Seconds that a pass of each region multiplies for."""
    return {region: per_product * sum(each._times for each in part) for region, part in parts.items()}


def _matrix(device: Streams) -> torch.Tensor:
    """One whose powers neither grow nor vanish."""
    side, dtype = (SIMULATED_SIDE, torch.float32) if is_simulated(device) else (SIDE, torch.float16)
    return torch.eye(side, dtype=dtype, device=device.device)


def _seconds_per_product(matrix: torch.Tensor, device: Streams, times: int = 100) -> float:
    """Median of five runs after one that does not count."""
    seconds = []
    for _ in range(6):
        product = matrix
        finish(device)
        start = perf_counter()
        for _ in range(times):
            product = matrix @ product
        finish(device)
        seconds.append((perf_counter() - start) / times)
    return median(seconds[1:])


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _room(model: nn.Module) -> int:
    """Bytes, every parameter at a multiple of the device's alignment."""
    return sum(align(parameter.numel() * parameter.element_size()) for parameter in model.parameters())


def _link(device: Streams) -> float:
    return SIMULATED_BANDWIDTH if is_simulated(device) else measure_link(device)


def _open(device: Streams, stack: contextlib.ExitStack, capacity_bytes: int, bandwidth: float) -> Streams:
    simulated = is_simulated(device)
    streams = open_for_contender(device, stack, capacity_bytes, bandwidth if simulated else None)
    if simulated:
        streams.poison = False  # no real device fills freed memory, and it takes the time of a copy
    return streams
