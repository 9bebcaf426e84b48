"""From measured passes to a result: what a row is, and what it is held against.

Problem: the limit and the best schedule must not rest on what they judge. They come from the resident model, measured in the
same run, and from the link, measured or set.

Terms as in DESIGN.md (Words). Called by `case` on the main thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from lib_async_lowvram.bench.contenders import Contender
from lib_async_lowvram.bench.devices import LATENCY, small_unit_bytes
from lib_async_lowvram.bench.measuring import Passes
from lib_async_lowvram.bench.memory import DeviceMemory
from lib_async_lowvram.bench.profile import Profile
from lib_async_lowvram.bench.results import Result
from lib_async_lowvram.learned import COPY_OVERHEAD_SECONDS

SETTLING = {"async": 3}
"""Passes at the start of a turn that are not timed: the mover's residents arrive, and its plan is refined. One for others."""


@dataclass
class Row:
    """What is measured under one key. The mover's rows share a contender and its `memory`."""

    key: str
    contender: Contender
    passes: Passes
    memory: DeviceMemory
    seconds: float = 0.0
    budget_bytes: int | None = None
    equal_to: str | None = None
    effective_bytes: int | None = None
    peak_weight_bytes: int | None = None
    peak_device_bytes: int | None = None
    pinned_bytes: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    pace: str | None = None
    """Key of the resident model's passes beside this row's; None where its own row's count."""

    @property
    def settling(self) -> int:
        return SETTLING.get(self.contender.name, 1)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The contender acts inside, and its device memory is watched."""
        with self.memory.turn():
            yield
        if self.memory.peak is not None:
            self.peak_device_bytes = max(self.memory.peak, self.peak_device_bytes or 0)


class Judge:
    """`leaves`: the resident model's. `total_bytes`: of the weights. `resident`: the row that tells what activations take."""

    def __init__(self, leaves: Profile, total_bytes: int, bandwidth: float, simulated: bool, resident: Row) -> None:
        self._leaves, self._total, self._bandwidth = leaves, total_bytes, bandwidth
        self._simulated, self._resident = simulated, resident
        self._overhead = LATENCY if simulated else COPY_OVERHEAD_SECONDS
        self._best: dict[tuple[int, float], float] = {}

    def weights_on_device(self, row: Row) -> int | None:
        """The most device bytes that its weights took: of the device's counter, or the total less what the resident model's
        activations take; None where nobody can tell."""
        if row.peak_weight_bytes is not None:
            return row.peak_weight_bytes
        if row.peak_device_bytes is None or self._resident.peak_device_bytes is None:
            return None
        return max(0, row.peak_device_bytes - max(0, self._resident.peak_device_bytes - self._total))

    def limit_seconds(self, held_bytes: int, compute_seconds: float) -> float:
        """max(compute, (weights - budget) / bandwidth)"""
        return max(compute_seconds, (self._total - held_bytes) / self._bandwidth)

    def best_schedule_seconds(self, budget_bytes: int, compute_seconds: float) -> float:
        """See `Profile.best_schedule_seconds`."""
        key = budget_bytes, compute_seconds
        if key not in self._best:
            small = small_unit_bytes(self._total)
            self._best[key] = self._leaves.best_schedule_seconds(
                budget_bytes, self._bandwidth, compute_seconds, self._overhead, small
            )
        return self._best[key]

    def floor_seconds(self, budget_bytes: int, compute_seconds: float) -> float:
        """See `core.floor`; at least the limit, which counts bytes without padding."""
        floor = self._leaves.floor_seconds(budget_bytes, self._bandwidth, compute_seconds)
        return max(floor, self.limit_seconds(budget_bytes, compute_seconds))

    @staticmethod
    def _streamed_units(row: Row) -> float:
        """Per pass, of the mover: every use of one is a hit or a miss."""
        return (row.details.get("hits", 0) + row.details.get("misses", 0)) / max(1, row.details.get("passes", 0))

    def launch_seconds(self, row: Row) -> float | None:
        return None if self._simulated else median(row.passes.launched[row.key])

    def result(self, row: Row, compute_seconds: float) -> Result:
        """`compute_seconds`: of the same model with everything resident, in the same rounds."""
        seconds = row.passes.median(row.key)
        held = row.effective_bytes if row.effective_bytes is not None else self.weights_on_device(row)
        limit = None if held is None else self.limit_seconds(held, compute_seconds)
        best = None if row.effective_bytes is None else self.best_schedule_seconds(row.effective_bytes, compute_seconds)
        stalls = row.passes.stalls.get(row.key) if row.contender.streams.knows_stalls else None
        overhead = seconds - compute_seconds - median(stalls) if stalls else None
        units = self._streamed_units(row)
        return Result(
            contender=row.contender.name,
            budget_bytes=row.budget_bytes,
            effective_budget_bytes=row.effective_bytes,
            equal_to=row.equal_to,
            seconds_per_pass=seconds,
            spread_seconds=row.passes.spread(row.key),
            passes=len(row.passes.seconds[row.key]),
            iterations_per_second=1 / seconds,
            launch_seconds=self.launch_seconds(row),
            limit_seconds=limit,
            floor_seconds=None if row.effective_bytes is None else self.floor_seconds(row.effective_bytes, compute_seconds),
            best_schedule_seconds=best,
            efficiency=None if limit is None else limit / seconds,
            schedule_efficiency=None if best is None else best / seconds,
            stall_seconds=median(stalls) if stalls else max(0.0, seconds - compute_seconds),
            stall_derived=not stalls,
            overhead_seconds=overhead,
            overhead_per_unit_seconds=overhead / units if overhead is not None and units else None,
            peak_weight_bytes=self.weights_on_device(row),
            peak_device_bytes=row.peak_device_bytes,
            host_pinned_bytes=row.pinned_bytes,
            bitwise_equal=row.key not in row.passes.wrong,
            outputs_compared_with="resident" if row.passes is self._resident.passes else "diffusers-resident",
            compute_seconds=compute_seconds,
            details={**row.details, "peak_weight_bytes_derived": row.peak_weight_bytes is None},
        )
