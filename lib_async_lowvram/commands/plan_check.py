"""`plan --check`: is the prediction true? A small UNet on the simulated device, predicted from its header, then run.

Problem: a prediction from names and shapes alone must be held against a measured pass. The simulated device really copies
bytes at a set bandwidth while one thread really computes, so both can be had anywhere: the checkpoint of `bench/unet.py` is
written, a resident pass is timed, `plan` predicts from the file's header, that time, the link and the budget - it knows no
layer's time - and the mover runs under the same budget and link. Resident passes and the mover's take turns, so that a machine
that slows down slows both. Every pass timed is compared bit for bit with the resident model's.

Called by `plan` on the main thread. Judges nothing: whoever reads the ratio knows how quiet the machine was.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lib_async_lowvram.bench.contenders import Async, Contender, Resident
from lib_async_lowvram.bench.measuring import BATCH, Passes, make_inputs, one_compute_thread
from lib_async_lowvram.bench.report import milliseconds, table
from lib_async_lowvram.bench.unet import load_checkpoint, write_checkpoint
from lib_async_lowvram.commands.common import CommandError, OutputsDiffer, write_json
from lib_async_lowvram.commands.plan import MIB, SCHEMA, wishes
from lib_async_lowvram.commands.plan_figures import Device, plan_rows, workload
from lib_async_lowvram.commands.unet_walk import LATENT_SCALE, Unet, walk
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.learned import IN_STEP_SECONDS
from lib_async_lowvram.safetensors_header import read_header

SD15_WEIGHT_BYTES = 1_719_041_928
"""SD1.5's UNet in half precision, for which the default of what a small unit is was chosen; scaled to the UNet at hand."""

LATENCY = 20e-6
"""Seconds per copy on the simulated link."""

INPUTS, WARM_UP, CALIBRATING, ROUNDS = 2, 3, 5, 3


def run_check(options: argparse.Namespace) -> None:
    """Print the table; raises as in `commands.common`. `options`: of `plan`."""
    if options.channels % 8 or options.channels > 320:
        raise CommandError(f"--channels must be a multiple of 8 of at most 320, not {options.channels}")
    if options.latent % 8 or options.latent > 128:
        raise CommandError(f"--latent must be a multiple of 8 of at most 128, not {options.latent}")
    for name in ("tflops", "compute_ms"):
        if getattr(options, name) is not None:
            raise CommandError(f"--check measures the computing: --{name.replace('_', '-')} says nothing there")
    if options.lookahead:
        raise CommandError("--check lets the mover choose the size of its ring: --lookahead says nothing there")
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_compute_thread())
        check = _Check(options, stack)
        figures = check.run()
    print(describe(figures))
    if options.json is not None:
        write_json(options.json, figures)
    if not figures["bitwise_equal"]:
        raise OutputsDiffer


def describe(figures: dict[str, Any]) -> str:
    """The table, with what it rests on."""
    rows = [
        [
            f"{row['budget_bytes'] / MIB:.0f} MB",
            milliseconds(row["resident_seconds"]),
            milliseconds(row["predicted_seconds"]),
            milliseconds(row["measured_seconds"]),
            f"{row['ratio']:.3f}",
            f"{row['fastest_ratio']:.3f}",
            f"{row['predicted_streamed_bytes'] / MIB:.0f} MB",
            f"{row['measured_streamed_bytes'] / MIB:.0f} MB",
        ]
        for row in figures["budgets"]
    ]
    header = [
        "budget",
        "all resident",
        "predicted",
        "measured",
        "measured/predicted",
        "the same, fastest",
        "streamed, predicted",
        "streamed, measured",
    ]
    verdict = "bit for bit equal" if figures["bitwise_equal"] else "NOT EQUAL"
    return "\n".join(
        [
            f"simulated device, link {figures['bandwidth_bytes_per_s'] / 1e9:.3g} GB/s; UNet of {figures['weight_bytes'] / MIB:.0f} MB, "
            f"{figures['channels']} channels, {figures['latent']}x{figures['latent']} positions",
            "",
            table(header, rows),
            "",
            "Medians; `the same, fastest`: the fastest pass, beside the prediction for the fastest resident one: for busy machines.",
            f"Outputs of {figures['compared_passes']} passes: {verdict}.",
        ]
    )


class _Check:
    """One run."""

    def __init__(self, options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self._options = options
        self._stack = stack
        inputs = make_inputs(INPUTS, options.latent, 1, torch.device("cpu"), torch.float32)
        each = min(ROUNDS, options.passes)
        self._rounds = [options.passes // each + (index < options.passes % each) for index in range(each)]
        per_budget = 2 * WARM_UP + sum(2 * (count + 1) for count in self._rounds)
        total = INPUTS + WARM_UP + CALIBRATING + len(options.budget) * per_budget
        self._progress = stack.enter_context(tqdm(total=total, unit="pass", leave=False, dynamic_ncols=True))
        self._passes = Passes(inputs, self._progress.update)

    def run(self) -> dict[str, Any]:
        options, passes = self._options, self._passes
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="async-lowvram-"))
        checkpoint = Path(folder) / "unet.safetensors"
        total = write_checkpoint(checkpoint, 0, options.channels)
        unet = walk(read_header(checkpoint), LATENT_SCALE * options.latent, LATENT_SCALE * options.latent)

        resident = self._stack.enter_context(Resident(load_checkpoint(checkpoint), self._open(2 * total)))
        passes.take_references(resident)
        passes.warm_up(resident, WARM_UP)
        passes.measure(resident, CALIBRATING)
        bandwidth = 1e9 * options.bandwidth if options.bandwidth else total / passes.median(resident)
        rows = [self._budget(checkpoint, unet, resident, budget, bandwidth, total) for budget in wishes(options.budget, total)]
        return {
            "schema": SCHEMA,
            "command": "plan --check",
            "device": resident.streams.name,
            "torch": torch.__version__,
            "channels": options.channels,
            "latent": options.latent,
            "weight_bytes": total,
            "bandwidth_bytes_per_s": bandwidth,
            "bitwise_equal": passes.equal,
            "compared_passes": passes.compared,
            "budgets": rows,
        }

    def _budget(self, checkpoint: Path, unet: Unet, resident: Contender, budget: int, bandwidth: float, total: int) -> dict[str, Any]:
        """Measure under one budget, then predict for what was measured beside it."""
        passes = self._passes
        small = max(1, OffloadConfig.small_leaf_bytes * total // SD15_WEIGHT_BYTES)
        with Async(load_checkpoint(checkpoint), self._open(2 * total, bandwidth), budget, small_leaf_bytes=small) as streamed:
            resident.name, streamed.name = f"resident beside {budget}", f"async {budget}"
            passes.warm_up(streamed, WARM_UP)
            streamed.new_job()  # it plans anew, with what passes so far have shown
            passes.warm_up(streamed, WARM_UP)
            resident.streams.poison = streamed.streams.poison = False  # it takes the time of a copy, and no real device does it
            streamed.reset()
            for count in self._rounds:
                for contender in (resident, streamed):
                    passes.warm_up(contender, 1)
                    passes.measure(contender, count)
            status = streamed.mover.status()
        typical = (passes.median(resident), passes.median(streamed))
        fastest = (passes.spread(resident)[0], passes.spread(streamed)[0])
        row, fast_row = (self._predict(unet, budget, bandwidth, compute, small) for compute, _ in (typical, fastest))
        return {
            "budget_bytes": row["budget_bytes"],
            "resident_seconds": typical[0],
            "predicted_seconds": row["seconds_per_pass"],
            "measured_seconds": typical[1],
            "ratio": typical[1] / row["seconds_per_pass"],
            "fastest_resident_seconds": fastest[0],
            "fastest_measured_seconds": fastest[1],
            "fastest_ratio": fastest[1] / fast_row["seconds_per_pass"],
            "predicted_streamed_bytes": row["streamed_bytes_per_pass"],
            "measured_streamed_bytes": status["streamed_bytes_per_pass"],
            "limit_seconds": row["limit_seconds"],
            "predicted_stall_seconds": row["stall_seconds"],
            "resident_spread_seconds": passes.spread(resident),
            "measured_spread_seconds": passes.spread(streamed),
            "mover": {key: status[key] for key in ("state", "reason", "best_schedule_seconds", "resident_bytes", "ring_bytes")},
        }

    def _predict(self, unet: Unet, budget: int, bandwidth: float, compute: float, small: int) -> dict[str, Any]:
        """As `plan` does, for this device: it computes in step with the host, and weights are as in the file."""
        device = Device(bandwidth, None, compute, images=BATCH, half=False, copy_seconds=LATENCY, step_seconds=IN_STEP_SECONDS)
        return plan_rows(workload(unet, device), [budget], 0, small)[0]

    def _open(self, capacity: int, bandwidth: float = float("inf")) -> SimulatedStreams:
        streams = SimulatedStreams(capacity_bytes=capacity, bandwidth=bandwidth, latency=LATENCY)
        self._stack.callback(streams.close)
        return streams
