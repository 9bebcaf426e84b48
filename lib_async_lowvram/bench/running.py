"""Runs of the benchmark: the cases of what was asked for, one document, files written as soon as there is something to write.

Problem: a run takes minutes and may be cut short, by its own deadline or by somebody's Ctrl+C, and what was measured by then
must not be lost. So the JSON is written after every case, and outputs are made sure of before any work.

Called by `command` and `suite` on the main thread. The table goes to stdout; progress goes to stderr.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib_async_lowvram.bench import environment, render, results
from lib_async_lowvram.bench.case import Case
from lib_async_lowvram.bench.deadline import Deadline
from lib_async_lowvram.bench.devices import is_simulated
from lib_async_lowvram.bench.loading import Components, measure_loading
from lib_async_lowvram.bench.measuring import one_compute_thread
from lib_async_lowvram.bench.options import BenchError, Budget
from lib_async_lowvram.bench.regions import measure_pictures, measure_regions
from lib_async_lowvram.bench.stored import check_writable, write_outputs
from lib_async_lowvram.bench.workloads import Workload, workload
from lib_async_lowvram.device.choose import open_streams
from lib_async_lowvram.device.streams import Streams

LOADING = (
    ("loading", "unload/load", measure_loading),
    ("regions", "unload/load of each region", measure_regions),
    ("pictures", "a picture's turn", measure_pictures),
)
"""What the workload `loading` measures: key of the document, what it is called, how."""


@dataclass(frozen=True)
class BenchSettings:
    """What to run: every model with every batch, on the simulated device over every link. `loading`: unloading and loading of
    SDXL's components as well. `seconds`: to keep to; None: as long as it takes. The paths are written where given."""

    models: tuple[str, ...]
    contenders: tuple[str, ...]
    budgets: tuple[Budget, ...]
    device: str | None = None
    passes: int = 5
    rounds: int = 3
    seed: int = 0
    batches: tuple[int, ...] = (2,)
    link_factors: tuple[float, ...] = (1.0,)
    loading: bool = False
    loading_scale: float | None = None
    seconds: float | None = None
    json: Path | None = None
    markdown: Path | None = None
    png: Path | None = None


@dataclass
class Shared:
    """What several runs use: the device, the time, and the newest model's weights, which take long to draw."""

    device: Streams
    deadline: Deadline
    weights: dict[Any, dict[str, torch.Tensor]] = field(default_factory=dict)

    def weights_of(self, load: Workload, seed: int) -> dict[str, torch.Tensor]:
        key = (load.shape, load.dtype, seed)
        if key not in self.weights:
            self.weights.clear()  # one model's at a time: SDXL's are five gigabytes
            self.weights[key] = load.weights(seed, self.device.device)
        return self.weights[key]


def run_bench(settings: BenchSettings, shared: Shared | None = None) -> dict[str, Any]:
    """Run, print the tables, write the files. Returns the document. Raises `BenchError`, `UnsupportedDevice`."""
    for path in (settings.json, settings.markdown, settings.png):
        check_writable(path)
    with contextlib.ExitStack() as stack:
        if shared is None:
            device = open_streams(settings.device)
            stack.callback(device.close)
            shared = Shared(device, Deadline(settings.seconds))
        if is_simulated(shared.device):
            stack.enter_context(one_compute_thread())
        document = _new_document(settings, shared.device)
        progress = stack.enter_context(tqdm(unit="pass", leave=False, dynamic_ncols=True))
        _run_cases(settings, shared, document, progress)
    print(render.text(document))
    return document


def _run_cases(settings: BenchSettings, shared: Shared, document: dict[str, Any], progress: tqdm) -> None:
    simulated = is_simulated(shared.device)
    factors = settings.link_factors if simulated else (1.0,)
    wanted = [(model, batch, factor) for model in settings.models for batch in settings.batches for factor in factors]
    outputs = (settings.json, settings.markdown, settings.png)
    for number, (model, batch, factor) in enumerate(wanted):
        left = len(wanted) - number + settings.loading
        name = f"{model}, batch {batch}" + (f", link x{factor:g}" if simulated else "")
        if number and shared.deadline.left() <= 0:
            document["notes"].append(f"{name}: not run, the time was over")
            write_outputs(document, *outputs)
            continue
        load = workload(model, simulated=simulated, batch=batch)
        progress.set_description(f"{name}: weights")
        try:
            case = Case(
                load,
                shared.weights_of(load, settings.seed),
                shared.device,
                contenders=settings.contenders,
                budgets=settings.budgets,
                rounds=settings.rounds,
                passes=settings.passes,
                seed=settings.seed,
                link_factor=factor,
                deadline=shared.deadline.part(1 / left),
                tell=lambda what, name=name: progress.set_description(f"{name}: {what}"),
                tick=progress.update,
            )
            document["cases"].append(case.run())
            del case  # its contenders hold a copy of the weights each, and the next model's are about to be drawn
        except torch.cuda.OutOfMemoryError as error:
            document["notes"].append(f"{name}: not run, the device has no room for it: {_first_line(error)}")
        write_outputs(document, *outputs)
    if settings.loading:
        scale = settings.loading_scale or (1 / 64 if simulated else 1.0)
        for number, (key, what, measure) in enumerate(LOADING):
            progress.set_description(what)
            deadline = shared.deadline.part(1 / (len(LOADING) - number))
            try:
                document[key] = measure(shared.device, Components.sdxl(scale), settings.rounds, settings.seed, deadline)
            except torch.cuda.OutOfMemoryError as error:
                document["notes"].append(f"{what}: not run, the device has no room for it: {_first_line(error)}")
            write_outputs(document, *outputs)
    if not document["cases"] and not document["loading"]:
        raise BenchError("; ".join(document["notes"]) or "nothing to run")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _new_document(settings: BenchSettings, device: Streams) -> dict[str, Any]:
    return {
        "schema": results.SCHEMA,
        "kind": results.KIND,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment.describe(device),
        "settings": {
            "models": list(settings.models),
            "contenders": list(settings.contenders),
            "budgets": [str(budget) for budget in settings.budgets],
            "passes": settings.passes,
            "rounds": settings.rounds,
            "seed": settings.seed,
            "batches": list(settings.batches),
            "link_factors": list(settings.link_factors),
            "seconds": settings.seconds,
        },
        "cases": [],
        "loading": [],
        "regions": [],
        "pictures": [],
        "notes": [],
    }
