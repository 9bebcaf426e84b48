"""`bench overhead`: what the host spends per pass in hooks, order, ring and bookkeeping.

Problem: on a fast GPU the time that Python takes to say what to do may be longer than doing it. This is measured apart from
everything else: as many leaves as SD1.5's UNet has (391), of the shapes of a narrower one, whose forward returns its argument, run
under the mover on a device that does nothing (`null_streams`), and run bare. The difference of the medians is ours, torch's
calling of hooks included.

Called by `command` on the main thread.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.bench.null_streams import NullStreams
from lib_async_lowvram.bench.report import table
from lib_async_lowvram.bench.shapes import sd15_shape
from lib_async_lowvram.bench.unet import UNet
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.mover import AsyncModelMover

SCHEMA = 1
SHARES = (0, 10, 50, 90, 100)
"""Percent of the weights that may be on the device; 0: the least that works, so that everything streams."""


class Leaf(nn.Module):
    """Holds weights as another module does, and computes nothing."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for name, parameter in like._parameters.items():
            self.register_parameter(name, None if parameter is None else nn.Parameter(torch.zeros(parameter.shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Leaves(nn.Module):
    """The leaves of a model, one after the other."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
        self.leaves = nn.ModuleList(Leaf(module) for module in owners)
        self._list = list(self.leaves)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for leaf in self._list:
            x = leaf(x)
        return x


@dataclass(frozen=True)
class OverheadSettings:
    """`passes`: of each row, in `rounds` that take the rows in turn. `channels`: of the UNet whose leaves these are."""

    passes: int = 50
    rounds: int = 5
    channels: int = 32
    json: Path | None = None


def run_overhead(settings: OverheadSettings) -> dict[str, Any]:
    """Run and print the table; what was measured, JSON-ready: seconds per pass, units, and how many of them stream."""
    with torch.device("meta"):
        shape = UNet(sd15_shape(settings.channels))
    bare = Leaves(shape)
    total = sum(parameter.numel() * parameter.element_size() for parameter in bare.parameters())
    x = torch.zeros(1)
    rows: dict[str, list[float]] = {"bare": []}
    movers, models, streamed = [], {"bare": bare}, {"bare": 0}
    for share in SHARES:
        model = Leaves(shape)
        mover = AsyncModelMover(OffloadConfig(budget_bytes=max(1, total * share // 100), small_leaf_bytes=0), NullStreams())
        mover.attach({"unet": model})
        name = f"{share}% on the device" if share else "all streaming"
        models[name], rows[name] = model, []
        movers.append(mover)
        with torch.no_grad():
            for _ in range(6):
                model(x)
        streamed[name] = sum(not unit.resident for unit in mover._networks["unet"].contents.units)
    with torch.no_grad():
        for _ in range(settings.rounds):
            for name, model in models.items():
                for _ in range(settings.passes):
                    start = perf_counter()
                    model(x)
                    rows[name].append(perf_counter() - start)
    for mover in movers:
        mover.close()
    seconds = {name: median(times) for name, times in rows.items()}
    result = {
        "schema": SCHEMA,
        "workload": "overhead",
        "torch": torch.__version__,
        "passes": settings.passes * settings.rounds,
        "channels": settings.channels,
        "units": len(bare.leaves),
        "streamed_units": streamed,
        "seconds_per_pass": seconds,
        "overhead_seconds": {name: value - seconds["bare"] for name, value in seconds.items()},
    }
    print(describe(result))
    if settings.json is not None:
        settings.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def describe(result: dict[str, Any]) -> str:
    """The printed table."""
    lines = []
    for name, own in result["overhead_seconds"].items():
        count = result["streamed_units"][name]
        each = f"{own / count * 1e6:.1f}" if count else ""
        lines.append([name, str(count), f"{result['seconds_per_pass'][name] * 1e3:.2f}", f"{own * 1e3:.2f}", each])
    head = [f"{result['units']} leaves that compute nothing", "streamed", "ms per pass", "ms of ours", "us per streamed unit"]
    return "\n".join(["", table(head, lines), ""])
