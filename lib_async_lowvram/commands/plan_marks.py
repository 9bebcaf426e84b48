"""`plan --marks`: the planner on exact shapes, beside the best schedules that others found, simple rules, the limit, and the floor.

Problem: a planner can only be judged on cases that somebody else has judged as well. The marks are the best of a coarse search
over five rules and six ring sizes, in a ring without places, at the same figures: SD1.5 at 512x512 on a device of 9.3 TFLOP/s, SDXL
at 1024x1024 on one of 12, two images at once, 12 us for the least kernel, 8 us per copy, 4 ms between passes, and a link that
streams all weights in exactly the time of computing (or four times slower, or faster). Arithmetic, not a measurement; only the
planning times are measured.

Called by `plan` on the main thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from lib_async_lowvram.bench.report import table
from lib_async_lowvram.bench.shapes import Shape, sd15_shape, sdxl_shape
from lib_async_lowvram.bench.unet import UNet
from lib_async_lowvram.commands.plan_figures import Device, workload
from lib_async_lowvram.commands.unet_walk import walk
from lib_async_lowvram.core.floor import floor_seconds
from lib_async_lowvram.core.pipeline import Workload, simulate
from lib_async_lowvram.core.places import assign_offsets
from lib_async_lowvram.core.plan import make_plan
from lib_async_lowvram.safetensors_header import TensorInfo

BETWEEN_PASSES = 4e-3
SMALL = 1 << 20
RINGS = (64, 128, 256, 384, 512, 768)
"""MB, for the simple rules."""

MARKS: dict[str, dict[float, dict[int, float]]] = {
    "sd15": {
        0.25: {10: 700.65, 25: 591.46, 30: 556.51, 50: 413.30, 70: 269.90, 90: 178.38},
        1: {10: 263.68, 25: 237.10, 30: 227.38, 50: 190.49, 70: 178.38, 90: 178.38},
        4: {10: 183.70, 25: 178.38, 30: 178.38, 50: 178.38, 70: 178.38, 90: 178.38},
    },
    "sdxl": {
        0.25: {10: 4164.81, 25: 3488.96, 30: 3252.58, 50: 2366.04, 70: 1445.42, 90: 1134.20},
        1: {10: 1317.92, 25: 1152.50, 30: 1134.20, 50: 1134.20, 70: 1134.20, 90: 1134.20},
        4: {10: 1134.20, 25: 1134.20, 30: 1134.20, 50: 1134.20, 70: 1134.20, 90: 1134.20},
    },
}
"""Milliseconds per pass by speed of the link and percent of the weights (shared/plan_reference/sweep.py, with two digits more)."""


def exact(shape: Shape, pixels: int, flops_per_second: float) -> Workload:
    """The workload of a UNet of this shape on a balanced link, all of which may stream."""
    with torch.device("meta"):
        parameters = dict(UNet(shape).named_parameters())
    tensors = {name: TensorInfo("F16", tuple(value.shape), 2 * value.numel()) for name, value in parameters.items()}
    load = workload(walk(tensors, pixels, pixels), Device(1.0, flops_per_second, None, images=2, half=True))
    load = replace(load, must_reside=frozenset(), lead_seconds=BETWEEN_PASSES)
    return replace(load, bandwidth=load.total_bytes / load.compute_seconds)


def rules(load: Workload) -> dict[str, list[int]]:
    """Simple rules: units in the order in which each makes them resident."""
    seconds, size = dict(load.steps), load.nbytes
    order = list(seconds)
    return {
        "prefix": order,
        "largest": sorted(order, key=lambda unit: -size[unit]),
        "smallest": sorted(order, key=lambda unit: size[unit]),
        "least compute": sorted(order, key=lambda unit: seconds[unit] / size[unit]),
        "even": [unit for start in range(7) for unit in order[start::7]],
    }


def simple(load: Workload, order: list[int], budget: int) -> float:
    """Seconds per pass of a simple rule with the best of some ring sizes; infinite where none of them fits."""
    best = float("inf")
    for megabytes in RINGS:
        room = budget - (megabytes << 20)
        resident = set()
        for unit in order:
            if load.nbytes[unit] <= room:
                resident.add(unit)
                room -= load.nbytes[unit]
        streamed = [unit for unit, _ in load.steps if unit not in resident]
        ring = budget - sum(load.nbytes[unit] for unit in resident)
        if streamed and 2 * max(load.nbytes[unit] for unit in streamed) <= ring <= budget:
            offsets = assign_offsets(streamed, load.nbytes, ring)
            best = min(best, simulate(load, frozenset(resident), offsets, ring).seconds)
    return best


def rows() -> Iterator[dict[str, Any]]:
    """One per network, link and budget. Seconds, bytes."""
    for shape, pixels, speed in ((sd15_shape(), 512, 9.3e12), (sdxl_shape(), 1024, 12e12)):
        balanced = exact(shape, pixels, speed)
        for link, marks in MARKS[shape.kind].items():
            load = replace(balanced, bandwidth=balanced.bandwidth * link)
            for share, mark in marks.items():
                budget = load.total_bytes * share // 100
                start = perf_counter()
                plan = make_plan(load, budget, small_unit_bytes=SMALL)
                took = perf_counter() - start
                yield {
                    "model": shape.kind,
                    "units": len(load.nbytes),
                    "link": link,
                    "share_percent": share,
                    "budget_bytes": budget,
                    "mark_seconds": mark / 1000,
                    "plan_seconds": plan.prediction.seconds,
                    "limit_seconds": plan.limit_seconds,
                    "floor_seconds": floor_seconds(load, plan.budget_bytes),
                    "resident_bytes": sum(load.nbytes[unit] for unit in plan.resident),
                    "ring_bytes": plan.ring_bytes,
                    "planning_seconds": took,
                    "rules_seconds": {name: simple(load, order, budget) for name, order in rules(load).items()},
                }


def describe(found: list[dict[str, Any]]) -> str:
    """The printed table; milliseconds."""
    lines = []
    names = list(found[0]["rules_seconds"])
    for row in found:
        ms = [row["limit_seconds"], row["floor_seconds"], row["mark_seconds"], row["plan_seconds"], *row["rules_seconds"].values()]
        share, link = f"{row['share_percent']}%", f"x{row['link']:g}"
        figures = [f"{1e3 * value:.1f}" if value < float("inf") else "" for value in ms]
        ring = f"{row['ring_bytes'] >> 20}"
        lines.append([f"{row['model']} {link}", share, *figures, ring, f"{1e3 * row['planning_seconds']:.0f}"])
    head = ["", "budget", "limit", "floor", "mark", "plan", *names, "ring MB", "planned in"]
    units = ", ".join(f"{name}: {count} units" for name, count in dict((row["model"], row["units"]) for row in found).items())
    return "\n".join(["", table(head, lines), "", f"Milliseconds per pass; {units}."])
