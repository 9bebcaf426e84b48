"""The demo: the same UNet under stock's moves and under the mover, on the best device at hand, in about a minute.

Problem: to see what the mover does without a WebUI, a checkpoint or a GPU. A UNet of SD1.5's shape gets seeded weights from
a safetensors file. On a CUDA GPU it is SD1.5's own size in half precision, and the link is what it is. Elsewhere it is
narrower, on the simulated device, whose link is set so that streaming all weights takes exactly as long as computing: with a
faster link or a slower one there is less to lose. Computing takes one thread, the copy engine has the other core. The budget
is half of the weights.

What is claimed is measured in the same run: the limit and the best schedule rest on resident passes interleaved with the
others, the peak comes from the device's own allocation counter, and outputs are compared bit for bit with the resident
model's, for several inputs; on the simulated device freed memory is full of NaN until the timed passes begin.

Called by the command line on the main thread. Prints one table to stdout; progress and errors go to stderr.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from lib_async_lowvram.bench.contenders import Async, Contender, Inputs, Resident, Stock, largest_block_bytes
from lib_async_lowvram.bench.devices import LATENCY, open_for_contender, small_unit_bytes
from lib_async_lowvram.bench.measuring import Passes, make_inputs, one_compute_thread
from lib_async_lowvram.bench.profile import Profile, profile
from lib_async_lowvram.bench.report import Timeline, draw_timelines, megabytes, milliseconds, table, write_trace
from lib_async_lowvram.bench.unet import load_checkpoint, write_checkpoint
from lib_async_lowvram.device.choose import open_streams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.learned import COPY_OVERHEAD_SECONDS

INPUTS = 3
"""Different inputs, used in turn."""

CALIBRATING, PROFILED, WARM_UP, TRACED = 7, 5, 3, (1, 4)
"""Passes beside the measured ones: resident ones to set the link by, and to time the leaves of; the mover's learning pass and
its first streamed ones, twice, as in two jobs; stock's and the mover's for the pictures."""


class DemoError(Exception):
    """The demo cannot run; the message is for the user."""


@dataclass(frozen=True)
class DemoSettings:
    """What to run. `channels` and `latent` (height and width of the latent picture) None: as the device can bear.

    `passes` are measured per contender, in `rounds` rounds that take the contenders in turn, so that a machine that slows
    down meanwhile slows all of them down.
    """

    out: Path = Path("demo")
    device: str | None = None
    seed: int = 0
    passes: int = 9
    rounds: int = 3
    channels: int | None = None
    latent: int | None = None


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run, print the table, write summary.json, timeline.png and trace.json. Returns the summary.

    Raises `DemoError` before any work when the output folder cannot be written, and `UnsupportedDevice` when the device
    cannot be used.
    """
    prepare_folder(settings.out)
    with contextlib.ExitStack() as stack:
        streams = open_streams(settings.device)
        stack.callback(streams.close)
        if isinstance(streams, SimulatedStreams):
            stack.enter_context(one_compute_thread())
        summary, timelines = _Demo(settings, streams, stack).run()
    title = (
        f"One UNet pass, device {summary['device']}: weights {megabytes(summary['total_weight_bytes'])}, "
        f"budget {megabytes(summary['budget_bytes'])}, link {summary['bandwidth_bytes_per_s'] / 1e6:.0f} MB/s"
    )
    draw_timelines(settings.out / "timeline.png", title, timelines)
    write_trace(settings.out / "trace.json", timelines)
    (settings.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(describe(summary))
    print(f"In {settings.out}: summary.json, timeline.png, and trace.json to open at ui.perfetto.dev.")
    return summary


def prepare_folder(out: Path) -> None:
    """Make the output folder, and make sure that files can be written there. Raises `DemoError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DemoError(f"cannot write to the output folder {out}: {error.strerror or error}. Choose another one with --out.") from error


def describe(summary: dict[str, Any]) -> str:
    """The printed table."""
    stock = summary["stock_seconds_per_pass"]

    def row(name: str, seconds: float, nbytes: int | None = None, stall: float | None = None) -> tuple[str, ...]:
        return (
            name,
            milliseconds(seconds),
            f"{seconds / stock:.2f}",
            "" if nbytes is None else megabytes(nbytes),
            "" if stall is None else milliseconds(stall),
        )

    rows = [
        row("stock --lowvram", stock, summary["stock_peak_weight_bytes"]),
        row("async", summary["async_seconds_per_pass"], summary["peak_weight_bytes"], summary["stall_seconds_per_pass"]),
        row("best schedule", summary["best_schedule_seconds_per_pass"], summary["budget_bytes"]),
        row("limit", summary["limit_seconds_per_pass"], summary["budget_bytes"]),
        row("all resident", summary["resident_seconds_per_pass"], summary["total_weight_bytes"]),
    ]
    verdict = "bit for bit equal" if summary["bitwise_equal"] else "NOT EQUAL"
    mover = summary["mover"]
    # A mover that gave way gives the right pixels, too.
    idle = [] if mover["state"] == "active" else [f"The mover was not active but {mover['state']}: {mover['reason']}"]
    return "\n".join(
        [
            "",
            table([summary["device"], "time per pass", "of stock", "weights on device", "stall"], rows),
            "",
            f"Outputs of {summary['compared_passes']} passes: {verdict}. Efficiency {summary['efficiency']:.2f} of the limit, "
            f"{summary['schedule_efficiency']:.2f} of the best schedule.",
            *idle,
        ]
    )


class _Demo:
    """One run. `stack` closes what it opens."""

    def __init__(self, settings: DemoSettings, streams: Streams, stack: contextlib.ExitStack) -> None:
        self._streams = streams
        self._stack = stack
        self._seed = settings.seed
        self.simulated = isinstance(streams, SimulatedStreams)
        self.channels = settings.channels or (128 if self.simulated else 320)
        self.latent = settings.latent or (32 if self.simulated else 64)
        self.dtype = torch.float32 if self.simulated else torch.float16
        rounds = min(settings.rounds, settings.passes)
        self._rounds = [settings.passes // rounds + (index < settings.passes % rounds) for index in range(rounds)]
        total = 2 * INPUTS + CALIBRATING + PROFILED + 2 * WARM_UP + sum(3 * (count + 1) for count in self._rounds) + sum(TRACED)
        # To stderr, also where that is no terminal: a run in CI should show that it is alive.
        self._progress = stack.enter_context(tqdm(total=total, unit="pass", leave=False, dynamic_ncols=True))
        self._inputs = make_inputs(INPUTS, self.latent, settings.seed + 1, streams.device, self.dtype)
        self._passes = Passes(self._inputs, self._progress.update)

    def run(self) -> tuple[dict[str, Any], list[Timeline]]:
        passes, tell = self._passes, self._progress.set_description
        tell("writing weights")
        checkpoint = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="async-lowvram-"))) / "unet.safetensors"
        total = write_checkpoint(checkpoint, self._seed, self.channels, self.dtype)
        budget = total // 2

        tell("measuring the compute time")
        resident = self._enter(Resident(load_checkpoint(checkpoint), self._open(2 * total)))
        passes.take_references(resident)
        passes.warm_up(resident, INPUTS)
        passes.measure(resident, CALIBRATING)
        bandwidth = total / passes.median(resident) if self.simulated else None
        passes.seconds.clear()  # calibration is over; what the limit rests on is measured beside the others
        leaves = self._profile(resident)

        tell("learning and warming up")
        stock = self._enter(Stock(load_checkpoint(checkpoint), self._open(2 * total, bandwidth)))
        small = small_unit_bytes(total)
        streamed = self._enter(Async(load_checkpoint(checkpoint), self._open(2 * total, bandwidth), budget, small_leaf_bytes=small))
        passes.warm_up(streamed, WARM_UP)
        streamed.new_job()
        passes.warm_up(streamed, WARM_UP)
        if self.simulated:
            # So far freed memory was filled with NaN. No real device does that, and it takes the time of a copy.
            for contender in (resident, stock, streamed):
                contender.streams.poison = False
        streamed.reset()
        for count in self._rounds:
            for contender in (resident, stock, streamed):
                tell(f"measuring {contender.name}")
                # The first of each is not timed: caches are cold, and the mover's lookahead had all the time of the others.
                passes.warm_up(contender, 1)
                passes.measure(contender, count)
        measured = streamed.measured()
        stock_peak = stock.measured().peak_weight_bytes

        tell("tracing")
        timelines = [passes.trace("stock --lowvram", stock, TRACED[0]), passes.trace("async", streamed, TRACED[1])]
        if self.simulated:
            timelines[1] = timelines[1].with_resident_compute()

        tell("looking for the best schedule")
        bandwidth = bandwidth or measured.details["bandwidth_bytes_per_s"]
        compute, seconds = passes.median(resident), passes.median(streamed)
        limit = max(compute, (total - budget) / bandwidth)
        best = leaves.best_schedule_seconds(budget, bandwidth, compute, LATENCY if self.simulated else COPY_OVERHEAD_SECONDS, small)
        summary = {
            "device": self._streams.name,
            "bitwise_equal": passes.equal,
            "stock_seconds_per_pass": passes.median(stock),
            "async_seconds_per_pass": seconds,
            "limit_seconds_per_pass": limit,
            "best_schedule_seconds_per_pass": best,
            "efficiency": limit / seconds,
            "schedule_efficiency": best / seconds,
            "stall_seconds_per_pass": median(passes.stalls[streamed.name]),
            "peak_weight_bytes": measured.peak_weight_bytes,
            "budget_bytes": budget,
            "total_weight_bytes": total,
            "resident_seconds_per_pass": compute,
            "stock_peak_weight_bytes": largest_block_bytes(stock.model) if stock_peak is None else stock_peak,
            "bandwidth_bytes_per_s": bandwidth,
            "compared_passes": passes.compared,
            "spread_seconds": {contender.name: passes.spread(contender) for contender in (resident, stock, streamed)},
            "torch": torch.__version__,
            "seed": self._seed,
            "channels": self.channels,
            "latent": self.latent,
            "mover": measured.details,
        }
        return summary, timelines

    def _open(self, capacity: int, bandwidth: float | None = None) -> Streams:
        return open_for_contender(self._streams, self._stack, capacity, bandwidth)

    def _enter(self, contender: Contender) -> Contender:
        return self._stack.enter_context(contender)

    def _profile(self, resident: Contender) -> Profile:
        def one_pass(inputs: Inputs) -> None:
            resident.run_pass(inputs)
            self._progress.update()

        return profile(resident.model, resident.streams, [partial(one_pass, self._inputs[n % INPUTS]) for n in range(PROFILED)])
