"""The benchmark's JSON: what one result is, and reading a stored file back.

Problem: tables, pictures and documents are made from files that may be months old, so the file says which schema it follows,
holds everything a table needs, and is checked when it is read: a wrong figure in a document is worse than an error.

Document: `schema`, `kind`, `created` (UTC), `environment`, `settings`, `cases`, `loading`, `regions`, `pictures`, `notes`. A case is one
workload over one link: its workload, weight bytes, link bandwidth, resident compute, results, and what was not run and why. Seconds, bytes,
bytes per second; None where nobody could tell. Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib_async_lowvram.bench.options import BenchError

SCHEMA = 3
READ = (1, 2, SCHEMA)
ADDED = ("regions", "pictures")
"""Keys that documents of schema 1 lack: nothing of the kind was measured."""

ADDED_TO_RESULTS = ("floor_seconds", "compute_seconds")
"""Keys that results may lack in documents of schema 1 and 2: not known."""

KIND = "async-lowvram bench"


@dataclass(frozen=True)
class Result:
    """One contender under one budget.

    Attributes:
        contender: its name. budget_bytes: asked for; None where it knows none. effective_budget_bytes: what it worked with:
            raised where too small to work at all. equal_to: the contender whose device bytes this budget equals, or None.
        seconds_per_pass: median; spread_seconds: least, lower quartile, upper quartile, most. passes: how many.
        iterations_per_second: 1 / seconds_per_pass: steps of the sampler.
        launch_seconds: of the median pass, until all of it was launched; None on a device that computes in step with the host.
        compute_seconds: of the same model with everything resident, in the same rounds; on the simulated device, for the mover, right
            before and after its turns.
        limit_seconds: max(compute, (weights - budget) / bandwidth), the budget being the effective one, or the peak weight bytes of a
            contender without one.
        floor_seconds: no schedule of any mover is faster under this budget (`core.floor`); None for a contender without one.
        best_schedule_seconds: of the planner's search from the resident profile under this budget.
        efficiency: limit / time. schedule_efficiency: best schedule / time.
        stall_seconds: per pass; measured, or where the device cannot tell, time beyond the resident compute (`stall_derived`).
        overhead_seconds: per pass, time that is neither computing nor stall: the mover's hooks, and whatever its copies take from
            the computing; None where the stall is not measured. overhead_per_unit_seconds: that, per streamed unit.
        peak_weight_bytes: of the device's own counter, learning excluded. peak_device_bytes: weights, activations and all.
        host_pinned_bytes: page-locked, as asked for.
        bitwise_equal: every output that of the same model with everything resident. outputs_compared_with: that model.
    """

    contender: str
    budget_bytes: int | None
    effective_budget_bytes: int | None
    equal_to: str | None
    seconds_per_pass: float
    spread_seconds: list[float]
    passes: int
    iterations_per_second: float
    launch_seconds: float | None
    limit_seconds: float | None
    floor_seconds: float | None
    best_schedule_seconds: float | None
    efficiency: float | None
    schedule_efficiency: float | None
    stall_seconds: float | None
    stall_derived: bool
    overhead_seconds: float | None
    overhead_per_unit_seconds: float | None
    peak_weight_bytes: int | None
    peak_device_bytes: int | None
    host_pinned_bytes: int | None
    bitwise_equal: bool
    outputs_compared_with: str
    details: dict[str, Any]
    compute_seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


PYTHON_BOUND = 0.9
"""Of a pass's time: when launching it takes that long, the device waits for Python, and another device would be no faster."""

NEVER_BLOCKING = ("resident", "async", "diffusers-resident")
"""Contenders whose launching does not wait for copies, so that it tells what Python takes."""


def bound_by_python(result: dict[str, Any]) -> bool:
    """Whether the row's time is Python's and not the device's. Known of contenders that never block the host."""
    launched = result["launch_seconds"]
    return result["contender"] in NEVER_BLOCKING and launched is not None and launched >= PYTHON_BOUND * result["seconds_per_pass"]


CASE_KEYS = (
    "workload",
    "weight_bytes",
    "link_factor",
    "bandwidth_bytes_per_s",
    "compute_seconds",
    "python_bound",
    "warm_up",
    "results",
    "not_run",
    "dropped",
)


def write(path: Path, document: dict[str, Any]) -> None:
    """Raises OSError where that cannot be written."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """A stored document. Raises `BenchError` when it is none, or of another schema, or lacks something."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BenchError(f"{path} is not JSON: {error}") from error
    check(document, str(path))
    return document


def check(document: Any, name: str) -> None:
    """Raises `BenchError` with one line saying what is wrong."""
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise BenchError(f"{name} is not a result of this benchmark")
    if document.get("schema") not in READ:
        raise BenchError(f"{name} follows schema {document.get('schema')!r}; this version reads {', '.join(map(str, READ))}")
    for key in ADDED if document["schema"] == 1 else ():
        document.setdefault(key, [])
    for key in ("created", "environment", "settings", "cases", "loading", *ADDED, "notes"):
        if key not in document:
            raise BenchError(f"{name} lacks {key!r}")
    for number, case in enumerate(document["cases"]):
        lacking = [key for key in CASE_KEYS if key not in case]
        if lacking:
            raise BenchError(f"{name}: case {number} lacks {', '.join(lacking)}")
        for result in case["results"]:
            for key in ADDED_TO_RESULTS if document["schema"] < SCHEMA else ():
                result.setdefault(key, None)
            lacking = [key for key in Result.__dataclass_fields__ if key not in result]
            if lacking:
                raise BenchError(f"{name}: a result of case {number} lacks {', '.join(lacking)}")


def all_equal(document: dict[str, Any]) -> bool:
    """Whether every output compared was the right one."""
    results = [result for case in document["cases"] for result in case["results"]]
    return all(result["bitwise_equal"] for result in [*results, *document["loading"], *document["regions"], *document["pictures"]])
