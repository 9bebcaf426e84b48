"""What `plan` computes: the UNet's leaves as a workload for the planner, and the plans' figures, as numbers and as text.

Problem: the planner wants seconds per leaf, and a header has none. So seconds follow from FLOPs and one rate, given by the user
(in TFLOP/s, or as the time of a whole pass) or assumed; and every figure printed says which.

Pure; no torch. Called by `plan` and `plan_check`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lib_async_lowvram.bench.report import milliseconds, table
from lib_async_lowvram.commands.unet_walk import PROMPT_TOKENS, Leaf, Unet, sum_flops
from lib_async_lowvram.core.floor import floor_seconds
from lib_async_lowvram.core.pipeline import Workload
from lib_async_lowvram.core.plan import GRAIN, Plan
from lib_async_lowvram.core.slack import make_plan_with_slack
from lib_async_lowvram.safetensors_header import FLOATING

LEAST_SECONDS = 12e-6
"""Of any kernel, however little it computes (shared/plan_reference)."""

COPY_SECONDS = 8e-6
"""Per copy, whatever its size; as the mover itself assumes (`learned.COPY_OVERHEAD_SECONDS`, which would import torch)."""

MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """What is planned for.

    Attributes:
        bandwidth: of the link, bytes per second.
        flops_per_second: of the computing, or None where `compute_seconds` is given: of one pass with everything resident.
        images: computed at once: the batch, times two for prompt and negative prompt.
        half: floating-point weights travel as two bytes each, else as they are stored.
        copy_seconds, step_seconds: per copy, and per firing of a streamed unit (`core.pipeline.Workload`).
    """

    bandwidth: float
    flops_per_second: float | None
    compute_seconds: float | None
    images: int
    half: bool
    copy_seconds: float = COPY_SECONDS
    step_seconds: float = 0.0


def leaf_bytes(leaf: Leaf, half: bool, grain: int = 1) -> int:
    """Bytes of a leaf's weights on the device, each tensor padded to a multiple of `grain`."""
    sizes = (2 * tensor.elements if half and tensor.dtype in FLOATING else tensor.nbytes for tensor in leaf.tensors)
    return sum(-(-size // grain) * grain for size in sizes)


def leaf_seconds(leaves: Sequence[Leaf], images: int, rate: float) -> list[float]:
    """Of each leaf that fires, the attention after it included, at `rate` FLOP/s."""
    parts = ((leaf.flops, leaf.attention_flops) for leaf in leaves if leaf.fires)
    return [sum(max(LEAST_SECONDS, images * flops / rate) for flops in each if flops) or LEAST_SECONDS for each in parts]


def rate_for(leaves: Sequence[Leaf], images: int, compute_seconds: float) -> float:
    """FLOP/s at which the leaves' seconds add up to `compute_seconds`; infinite where kernels alone take longer."""
    if not sum_flops(leaves) or sum(leaf_seconds(leaves, images, float("inf"))) >= compute_seconds:
        return float("inf")
    # Without the least per kernel it would be this; with it the true rate is higher, and the sum falls as the rate grows.
    low = images * sum_flops(leaves) / compute_seconds
    high = 2 * low
    while sum(leaf_seconds(leaves, images, high)) > compute_seconds:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(leaf_seconds(leaves, images, middle)) > compute_seconds else (low, middle)
    return high


def workload(unet: Unet, device: Device) -> Workload:
    """Units are the leaves by number, padded as the mover pads them. What stock leaves on the device must stay there."""
    leaves = unet.leaves
    rate = device.flops_per_second or rate_for(leaves, device.images, device.compute_seconds)
    seconds = leaf_seconds(leaves, device.images, rate)
    if device.compute_seconds is not None:
        scale = device.compute_seconds / sum(seconds)  # one but for rounding, or where kernels alone take longer
        seconds = [each * scale for each in seconds]
    return Workload(
        steps=tuple(enumerate(seconds)),
        nbytes={number: leaf_bytes(leaf, device.half, GRAIN) for number, leaf in enumerate(leaves)},
        bandwidth=device.bandwidth,
        must_reside=frozenset(number for number, leaf in enumerate(leaves) if not leaf.block),
        copy_overhead_seconds=device.copy_seconds,
        step_overhead_seconds=device.step_seconds,
    )


def stock_seconds(unet: Unet, device: Device, load: Workload) -> float:
    """What stock's moves make of a pass: computing + 2 x bytes of its blocks / bandwidth, since every block goes there and
    back while nothing is computed. Its memory is pageable, which halves most links: so this is the least."""
    moved = sum(leaf_bytes(leaf, device.half) for leaf in unet.leaves if leaf.block)
    return load.compute_seconds + 2 * moved / device.bandwidth


def plan_row(load: Workload, plan: Plan, wish: int) -> dict[str, Any]:
    """One budget's figures, in bytes and seconds."""
    seconds = plan.prediction.seconds
    return {
        "wanted_budget_bytes": wish,
        "budget_bytes": plan.budget_bytes,
        "resident_bytes": sum(load.nbytes[unit] for unit in plan.resident),
        "resident_units": len(plan.resident),
        "ring_bytes": plan.ring_bytes,
        "streamed_bytes_per_pass": plan.prediction.streamed_bytes,
        "seconds_per_pass": seconds,
        "its": 1 / seconds,
        "stall_seconds": plan.prediction.stall_seconds,
        "limit_seconds": plan.limit_seconds,
        "floor_seconds": floor_seconds(load, plan.budget_bytes),
        "efficiency": plan.limit_seconds / seconds,
        "bound": "copy" if plan.limit_seconds > load.compute_seconds else "compute",
        "notes": list(plan.notes),
    }


def plan_rows(load: Workload, wishes: Sequence[int], lookahead: int, small: int) -> list[dict[str, Any]]:
    """One row for each budget of `wishes`, bytes."""
    return [plan_row(load, make_plan_with_slack(load, wish, lookahead_bytes=lookahead, small_unit_bytes=small), wish) for wish in wishes]


def describe_unet(unet: Unet, device: Device, pixels: tuple[int, int]) -> dict[str, Any]:
    """What was found in the file."""
    leaves = unet.leaves
    silent = [leaf for leaf in leaves if not leaf.fires]
    return {
        "naming": unet.naming,
        "prefix": unet.prefix,
        "leaves": len(leaves) - len(silent),
        "weight_bytes": sum(leaf_bytes(leaf, device.half) for leaf in leaves),
        "flops_per_pass": int(device.images * sum_flops(leaves)),
        "images": device.images,
        "width": pixels[0],
        "height": pixels[1],
        "unknown_leaves": len(silent),
        "unknown_bytes": sum(leaf_bytes(leaf, device.half) for leaf in silent),
    }


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table, one line per budget."""
    header = ["budget", "resident", "ring", "streamed/pass", "per pass", "it/s", "stall", "limit", "floor", "efficiency", "bound"]
    lines = [
        [
            _mib(row["budget_bytes"]),
            _mib(row["resident_bytes"]),
            _mib(row["ring_bytes"]),
            _mib(row["streamed_bytes_per_pass"]),
            milliseconds(row["seconds_per_pass"]),
            f"{row['its']:.2f}",
            milliseconds(row["stall_seconds"]),
            milliseconds(row["limit_seconds"]),
            milliseconds(row["floor_seconds"]),
            f"{row['efficiency']:.2f}",
            row["bound"],
        ]
        for row in rows
    ]
    return table(header, lines)


def summary_lines(found: dict[str, Any]) -> list[str]:
    """About the UNet, for people."""
    lines = [
        f"UNet named as in {found['naming']}: {found['leaves']} layers with weights, {_mib(found['weight_bytes'])} on the device, "
        f"{found['flops_per_pass'] / 1e12:.3g} TFLOP per pass",
        f"picture: {found['width']}x{found['height']}, {found['images']} images at once (each with its negative), {PROMPT_TOKENS} tokens "
        "of prompt",
    ]
    if found["unknown_leaves"]:
        lines.append(
            f"note: {found['unknown_leaves']} layers ({_mib(found['unknown_bytes'])}) are of no kind known here; taken for weights that "
            "are never used"
        )
    return lines


def note_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the planner has to say about budgets, each once."""
    return list(dict.fromkeys(f"note: {note}" for row in rows for note in row["notes"]))


def with_compute(device: Device, seconds: float) -> Device:
    """The same device with a measured pass."""
    return replace(device, flops_per_second=None, compute_seconds=seconds)


def _mib(nbytes: float) -> str:
    return f"{nbytes / MIB:.0f} MB"
