"""`bench --suite`: a whole set of measurements within a time budget, one JSON per step, one table and one picture of all.

Problem: a machine with a GPU is often borrowed, for minutes and without a network. So one command measures all that the
project's claims rest on, most important first, keeps its time (`deadline`), and has written whatever it had measured when the
machine goes away. `tiny` is the same on the simulated device at small sizes, to try the script before there is a GPU.

To carry: this repository, and a Python with torch, numpy, safetensors, tqdm and matplotlib; for the peers' rows diffusers,
accelerate and mmgp as well. No weights: they are drawn from a seed.

Called by `command` on the main thread.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib_async_lowvram.bench import results, stored
from lib_async_lowvram.bench.deadline import Deadline
from lib_async_lowvram.bench.devices import is_simulated
from lib_async_lowvram.bench.options import CONTENDERS, OURS, BenchError, parse_budgets
from lib_async_lowvram.bench.running import BenchSettings, Shared, run_bench
from lib_async_lowvram.device.choose import open_streams

GPU_SECONDS, TINY_SECONDS = 460.0, 120.0


@dataclass(frozen=True)
class Step:
    """`name`: of its JSON. `weight`: of the time left, against the steps after it."""

    name: str
    weight: float
    settings: BenchSettings


def steps_of(suite: str, seed: int, loading_scale: float | None = None) -> tuple[Step, ...]:
    """What `suite` ("gpu" or "tiny") measures, most important first. Raises `BenchError` for another name."""
    full = BenchSettings((), CONTENDERS, parse_budgets(["10%,25%,50%,70%,90%,equal"]), seed=seed)
    fewer = replace(full, contenders=(*OURS, "diffusers-resident", "diffusers-group"), budgets=parse_budgets(["10%,50%,equal"]))
    if suite == "gpu":
        return (
            Step("sd15", 3, replace(full, models=("sd15",))),
            Step("sdxl", 5, replace(full, models=("sdxl",))),
            Step("loading", 1, replace(full, models=(), loading=True)),
            Step("sd15-large", 2, replace(fewer, models=("sd15",), batches=(16,), rounds=2, passes=3)),
            Step("sdxl-large", 3, replace(fewer, models=("sdxl",), batches=(8,), rounds=2, passes=3)),
        )
    if suite == "tiny":
        small = replace(full, models=("tiny",), rounds=2, passes=2)
        return (
            Step("tiny", 3, replace(small, link_factors=(0.25, 1.0, 4.0))),
            Step("loading", 1, replace(small, models=(), loading=True, loading_scale=loading_scale or 1 / 256)),
            Step("tiny-large", 1, replace(small, contenders=OURS, budgets=parse_budgets(["50%"]), batches=(4,))),
        )
    raise BenchError(f"--suite {suite}: choose gpu or tiny")


def run_suite(suite: str, folder: Path, *, device: str | None, seed: int, seconds: float | None) -> list[dict[str, Any]]:
    """Run the steps, write `folder`/NAME.json, suite.md and suite.png. Returns the documents. A step that fails is told, with
    its traceback, and the others go on; in the end that is a `BenchError` all the same. `device` None: CUDA for "gpu",
    simulated for "tiny". Raises `BenchError`, `UnsupportedDevice`."""
    steps = steps_of(suite, seed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    written: list[Path] = []
    failed: list[str] = []
    documents: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        opened = open_streams(device or ("cuda" if suite == "gpu" else "simulated"))
        stack.callback(opened.close)
        if suite == "tiny" and not is_simulated(opened):
            raise BenchError("--suite tiny is for the simulated device; use --suite gpu")
        if suite == "gpu" and is_simulated(opened):
            raise BenchError("--suite gpu needs a CUDA device; use --suite tiny")
        whole = Deadline(seconds or (GPU_SECONDS if suite == "gpu" else TINY_SECONDS))
        shared = Shared(opened, whole)
        for number, step in enumerate(steps):
            if whole.left() <= 0:
                print(f"{step.name}: not run, the time is over")
                continue
            shared.deadline = whole.part(step.weight / sum(later.weight for later in steps[number:]))
            path = folder / f"{step.name}.json"
            try:
                documents.append(run_bench(replace(step.settings, json=path), shared))
            except BenchError as error:
                print(f"{step.name}: not run, {error}")
                continue
            except Exception as error:  # on a borrowed machine the other steps are worth more than an early end
                traceback.print_exc()
                failed.append(f"{step.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                continue
            written.append(path)
            _write_summary(written, folder)
    if not written and not failed:
        raise BenchError("nothing could be measured; the lines above say why")
    print(f"In {folder}: {', '.join(path.name for path in written)}, suite.md, suite.png.")
    if failed:
        raise BenchError(f"steps failed: {'; '.join(failed)}")
    return documents


def _write_summary(written: Sequence[Path], folder: Path) -> None:
    """After each step: what is there so far."""
    joined = stored.join([results.read(path) for path in written])
    stored.write_outputs(joined, None, folder / "suite.md", folder / "suite.png")
