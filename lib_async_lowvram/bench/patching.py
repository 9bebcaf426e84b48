"""`bench patching`: what a change of LoRA costs, under stock's moves and under the mover, in one run.

Problem: the first pass after a LoRA is chosen, changed or removed patches every layer on the device; under stock that comes
on top of moving every block both ways, under the mover changed units must be written back. Is it at most stock's time? How
much of it need not be done at all (`backups`)?

Rows are events: a steady pass, the first pass with a LoRA never used before (backups are taken), the pass after it, the first
pass with another strength, the first one without (everything is restored), the pass after that, and the first pass with a LoRA
whose backups exist. Columns are contenders: stock, the mover, and the mover asked for backups (`async + masters`). Every
pass's output is compared bit for bit with the resident model's under the same LoRA.

Called by `__main__` on the main thread.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tqdm import tqdm

from lib_async_lowvram.bench.contenders import Async, Contender, Resident, Stock
from lib_async_lowvram.bench.devices import open_for_contender, small_unit_bytes
from lib_async_lowvram.bench.lora import Lora
from lib_async_lowvram.bench.measuring import make_inputs, one_compute_thread, same_bits
from lib_async_lowvram.bench.report import megabytes, milliseconds, table
from lib_async_lowvram.bench.unet import load_checkpoint, write_checkpoint
from lib_async_lowvram.device.choose import open_streams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Streams

SCHEMA = 1
EVENTS = ("steady", "first use", "after it", "other strength", "removed", "after removal", "used again")
STRENGTHS = (None, 0.8, 0.8, 0.5, None, None, 0.8)
COUNTED = ("write_backs", "write_back_waits", "refetches", "misses", "adopted")
WARM_UP = 3


@dataclass(frozen=True)
class PatchingSettings:
    """What to run. `channels` and `latent` None: as the device can bear. `rounds`: times each event is measured."""

    device: str | None = None
    seed: int = 0
    rounds: int = 3
    channels: int | None = None
    latent: int | None = None
    json: Path | None = None


def run_patching(settings: PatchingSettings) -> dict[str, Any]:
    """Run, print the table, write the JSON where asked. Returns what was written. Raises `UnsupportedDevice`."""
    with contextlib.ExitStack() as stack:
        device = open_streams(settings.device)
        stack.callback(device.close)
        if isinstance(device, SimulatedStreams):
            stack.enter_context(one_compute_thread())
        result = _Run(settings, device, stack).run()
    print(describe(result))
    if settings.json is not None:
        settings.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def describe(result: dict[str, Any]) -> str:
    """The printed table: milliseconds per event and contender, and what the mover's counters say."""
    seconds, counts = result["seconds"], result["counts"]
    names = list(seconds)
    rows = [[event, *(milliseconds(seconds[name][event]) for name in names)] for event in EVENTS]
    moved = []
    for event in EVENTS:
        each = [counts[name][event] for name in names]
        moved.append([event, *(str(count["write_backs"]) for count in each[1:]), *(megabytes(count["lora_bytes"]) for count in each)])
    compared = result["compared_passes"]
    verdict = "bit for bit equal" if result["bitwise_equal"] else "NOT EQUAL"
    return "\n".join(
        [
            "",
            table([f"{result['device']}: one pass", *names], rows),
            "",
            table(["", *(f"write-backs, {name}" for name in names[1:]), *(f"moved by LoRA, {name}" for name in names)], moved),
            "",
            f"{result['units']} units, {result['layers_patched']} layers patched. Outputs of {compared} passes: {verdict}.",
        ]
    )


class _Run:
    """One run. `stack` closes what it opens."""

    def __init__(self, settings: PatchingSettings, device: Streams, stack: contextlib.ExitStack) -> None:
        self._settings = settings
        self._device = device
        self._stack = stack
        self._simulated = isinstance(device, SimulatedStreams)
        self._channels = settings.channels or (96 if self._simulated else 320)
        latent = settings.latent or (32 if self._simulated else 64)
        self._dtype = torch.float32 if self._simulated else torch.float16
        self._inputs = make_inputs(1, latent, settings.seed + 1, device.device, self._dtype)[0]
        self._references: dict[float | None, torch.Tensor] = {}
        self._equal, self._compared = True, 0
        total = 2 * len(set(STRENGTHS)) + WARM_UP + 3 * (WARM_UP + settings.rounds * (1 + len(EVENTS)))
        self._progress = stack.enter_context(tqdm(total=total, unit="pass", leave=False, dynamic_ncols=True))

    def run(self) -> dict[str, Any]:
        settings, stack = self._settings, self._stack
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="async-lowvram-")))
        checkpoint = folder / "unet.safetensors"
        total = write_checkpoint(checkpoint, settings.seed, self._channels, self._dtype)
        compute = self._take_references(Resident(load_checkpoint(checkpoint), self._open(2 * total)))
        bandwidth = total / compute if self._simulated else None
        small = small_unit_bytes(total)

        def mover() -> Async:
            return Async(load_checkpoint(checkpoint), self._open(2 * total, bandwidth), total // 2, small_leaf_bytes=small)

        contenders = {
            "stock": Stock(load_checkpoint(checkpoint), self._open(2 * total, bandwidth)),
            "async": mover(),
            "async + masters": mover(),
        }
        seconds: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in contenders}
        counts: dict[str, dict[str, dict[str, int]]] = {name: {} for name in contenders}
        loras = {}
        for name, contender in contenders.items():
            stack.enter_context(contender)
            lora = loras[name] = self._lora(contender)
            if name == "async + masters":
                lora.backups = contender.mover.backups
            for _ in range(WARM_UP):
                self._one(contender, lora)
            if self._simulated:
                contender.streams.poison = False  # no real device fills freed memory, and it takes the time of a copy
        for _ in range(settings.rounds):
            for name, contender in contenders.items():  # in turn: a machine that slows down meanwhile slows all of them
                self._progress.set_description(name)
                lora = loras[name]
                lora.forget_backups()
                lora.strength = None
                self._one(contender, lora)
                for event, strength in zip(EVENTS, STRENGTHS, strict=True):
                    lora.strength = strength
                    before = self._counts(contender, lora)
                    seconds[name][event].append(self._one(contender, lora))
                    counts[name][event] = {key: value - before[key] for key, value in self._counts(contender, lora).items()}
                lora.strength = None
                self._one(contender, lora)
        return {
            "schema": SCHEMA,
            "workload": "patching",
            "device": self._device.name,
            "torch": torch.__version__,
            "seed": settings.seed,
            "channels": self._channels,
            "rounds": settings.rounds,
            "weight_bytes": total,
            "budget_bytes": total // 2,
            "bandwidth_bytes_per_s": bandwidth,
            "units": contenders["async"].mover.status()["networks"]["unet"]["units"],
            "layers_patched": loras["stock"].patched,
            "bitwise_equal": self._equal,
            "compared_passes": self._compared,
            "seconds": {name: {event: median(times[event]) for event in EVENTS} for name, times in seconds.items()},
            "counts": counts,
        }

    def _take_references(self, resident: Resident) -> float:
        """The right output for each strength. Returns the compute time, seconds per pass."""
        with resident:
            lora = self._lora(resident)
            for strength in (0.8, 0.5, None):
                lora.strength = strength
                self._references[strength] = self._pass(resident)[0].clone()
            times = [self._pass(resident)[1] for _ in range(WARM_UP)]
            lora.close()
        outputs = list(self._references.values())
        if not all(bool(output.isfinite().all()) for output in outputs) or any(same_bits(outputs[0], other) for other in outputs[1:]):
            raise RuntimeError("the outputs are not finite, or do not depend on the LoRA: nothing to compare")
        return median(times)

    def _lora(self, contender: Contender) -> Lora:
        lora = Lora(contender.model, contender.streams, self._settings.seed + 2)
        self._stack.callback(lora.close)
        return lora

    def _pass(self, contender: Contender) -> tuple[torch.Tensor, float]:
        contender.finish()
        start = perf_counter()
        output = contender.run_pass(self._inputs)
        contender.finish()
        seconds = perf_counter() - start
        self._progress.update()
        return output, seconds

    def _one(self, contender: Contender, lora: Lora) -> float:
        output, seconds = self._pass(contender)
        self._equal &= same_bits(output, self._references[lora.strength])
        self._compared += 1
        return seconds

    @staticmethod
    def _counts(contender: Contender, lora: Lora) -> dict[str, int]:
        counts = {"lora_bytes": lora.moved_bytes}
        if isinstance(contender, Async):
            status = contender.mover.status()
            counts.update({key: status[key] for key in COUNTED})
        return counts

    def _open(self, capacity: int, bandwidth: float | None = None) -> Streams:
        return open_for_contender(self._device, self._stack, capacity, bandwidth)
