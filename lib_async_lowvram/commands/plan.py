"""`plan`: what to expect of a checkpoint under a budget, from the header of its file alone.

Problem: before anything is installed, or on another machine, one wants to know what a budget buys. This reads a safetensors
header (never tensor data), finds the UNet, derives what each layer weighs and computes, and lets the mover's own planner
predict a pass. What it cannot know - how fast the device computes, how fast the link is - is an assumption unless given, and
printed as one.

`--check` measures instead: a small UNet on the simulated device, predicted as above from its own checkpoint's header, and run.

`--marks` judges the planner itself. Called by `__main__`. Imports no torch but for these two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lib_async_lowvram.commands.common import CommandError, at_least_one, check_writable, not_negative, positive, write_json

if TYPE_CHECKING:
    from lib_async_lowvram.commands.plan_figures import Device
    from lib_async_lowvram.commands.unet_walk import Unet

SCHEMA = 1
CHECK_NEEDS = ("torch", "numpy", "safetensors", "tqdm")
MIB = 1 << 20

ASSUMED_TFLOPS = 10.0
ASSUMED_GB_PER_SECOND = 12.0

DEFAULT_BUDGETS = "10%,25%,50%,75%,100%"


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `plan` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="what a budget would give for a checkpoint, from its file's header alone",
        description="Read the header of a safetensors checkpoint (no tensor data), find the UNet, and predict the time per pass under "
        "one or more budgets. MB are 2**20 bytes, as in Settings; GB/s are 10**9 bytes per second.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .safetensors file")
    source.add_argument(
        "--check",
        action="store_true",
        help="instead of a checkpoint: predict a small UNet on the simulated device, run it there, and compare (a minute or two)",
    )
    source.add_argument(
        "--marks",
        action="store_true",
        help="instead of a checkpoint: the planner on SD1.5's and SDXL's exact shapes, beside simple rules and the best schedules known",
    )
    parser.add_argument(
        "--budget",
        type=budgets,
        default=DEFAULT_BUDGETS,
        metavar="MB|N%%[,...]",
        help=f"device memory for weights: megabytes, or a share of the weights (default: {DEFAULT_BUDGETS.replace('%', '%%')})",
    )
    parser.add_argument(
        "--bandwidth",
        type=positive,
        metavar="GB/s",
        help=f"of the link to the device (assumed: {ASSUMED_GB_PER_SECOND:g}; with --check, that streaming takes as long as computing)",
    )
    compute = parser.add_mutually_exclusive_group()
    compute.add_argument("--tflops", type=positive, metavar="T", help=f"what the device computes (assumed: {ASSUMED_TFLOPS:g})")
    compute.add_argument("--compute-ms", type=positive, metavar="MS", help="milliseconds per pass with all weights on the device")
    parser.add_argument("--width", type=at_least_one, default=512, metavar="W", help="of the picture, pixels (default: 512)")
    parser.add_argument("--height", type=at_least_one, default=512, metavar="H", help="of the picture, pixels (default: 512)")
    parser.add_argument("--batch", type=at_least_one, default=1, metavar="N", help="pictures at once, each with its negative (default: 1)")
    parser.add_argument("--lookahead", type=not_negative, default=0.0, metavar="MB", help="size of the ring (default: 0, chosen here)")
    parser.add_argument(
        "--dtype",
        choices=["fp16", "as-stored"],
        default="fp16",
        help="of the weights on the device: half precision, as the WebUI loads them, or as they are in the file (default: fp16)",
    )
    parser.add_argument("--channels", type=at_least_one, default=128, metavar="C", help="with --check: width of the UNet (default: 128)")
    parser.add_argument("--latent", type=at_least_one, default=32, metavar="L", help="with --check: side of its picture (default: 32)")
    parser.add_argument("--passes", type=at_least_one, default=9, metavar="N", help="with --check: passes to measure (default: 9)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.set_defaults(run=run, needs=needs, what="plan --check or --marks")


def needs(options: argparse.Namespace) -> tuple[str, ...]:
    """Packages; alone it needs none."""
    return CHECK_NEEDS if options.check else ("torch",) if options.marks else ()


def budgets(text: str) -> list[tuple[float, bool]]:
    """For `type=`: "600,25%" -> [(600.0, False), (25.0, True)]: number, and whether it is a share of the weights in percent."""
    found = []
    for part in text.split(","):
        part = part.strip()
        try:
            number = positive(part.removesuffix("%"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part[:40]!r} is neither megabytes nor a percentage") from None
        if number > 1e9:
            raise argparse.ArgumentTypeError(f"{part[:40]!r} is too large")
        found.append((number, part.endswith("%")))
    return found


def wishes(budgets: list[tuple[float, bool]], total_bytes: int) -> list[int]:
    """Bytes of each budget."""
    return [int(number * total_bytes / 100) if share else int(number * MIB) for number, share in budgets]


def run(options: argparse.Namespace) -> None:
    """Raises as in `commands.common`."""
    check_writable(options.json)
    if options.check:
        from lib_async_lowvram.commands.plan_check import run_check

        run_check(options)
        return
    if options.marks:
        from lib_async_lowvram.commands.plan_marks import describe, rows

        found = list(rows())
        print(describe(found))
        if options.json is not None:
            write_json(options.json, {"schema": SCHEMA, "marks": found})
        return
    from lib_async_lowvram.commands.plan_figures import (
        describe_unet,
        note_lines,
        plan_rows,
        rows_table,
        stock_seconds,
        summary_lines,
        workload,
    )
    from lib_async_lowvram.commands.unet_names import NoUnet
    from lib_async_lowvram.commands.unet_walk import walk
    from lib_async_lowvram.config import OffloadConfig
    from lib_async_lowvram.safetensors_header import HeaderError, read_header

    try:
        tensors = read_header(options.checkpoint)
    except HeaderError as error:
        raise CommandError(str(error)) from error
    try:
        unet = walk(tensors, options.width, options.height)
    except NoUnet as error:
        raise CommandError(f"{options.checkpoint}: {error}") from error
    device, told = _device(options)
    load = workload(unet, device)
    found = describe_unet(unet, device, (options.width, options.height))
    rows = plan_rows(load, wishes(options.budget, load.total_bytes), int(options.lookahead * MIB), OffloadConfig().small_leaf_bytes)
    stock = stock_seconds(unet, device, load)

    print("\n".join([*summary_lines(found), *told, "", rows_table(rows), ""]))
    print(f"all on the device: {1e3 * load.compute_seconds:.0f} ms per pass")
    print(f"stock --lowvram: {1e3 * stock:.0f} ms per pass at least = computing + 2 x {sum_moved(unet, device) / MIB:.0f} MB / bandwidth:")
    print("  each block there and back, with nothing computed meanwhile; its memory is pageable, whose bandwidth is lower")
    for line in note_lines(rows):
        print(line)
    if options.json is not None:
        figures = {
            "schema": SCHEMA,
            "command": "plan",
            "unet": found,
            "assumptions": told,
            "bandwidth_bytes_per_s": device.bandwidth,
            "flops_per_second": device.flops_per_second,
            "compute_seconds_per_pass": load.compute_seconds,
            "stock_seconds_per_pass": stock,
            "total_bytes": load.total_bytes,
            "budgets": rows,
        }
        write_json(options.json, figures)


def sum_moved(unet: Unet, device: Device) -> int:
    """Bytes of the blocks that stock moves."""
    from lib_async_lowvram.commands.plan_figures import leaf_bytes

    return sum(leaf_bytes(leaf, device.half) for leaf in unet.leaves if leaf.block)


def _device(options: argparse.Namespace) -> tuple[Device, list[str]]:
    """What is planned for, and one line for each figure that it rests on."""
    from lib_async_lowvram.commands.plan_figures import Device

    bandwidth = options.bandwidth or ASSUMED_GB_PER_SECOND
    told = [f"link: {bandwidth:g} GB/s ({'as given' if options.bandwidth else 'AN ASSUMPTION: give --bandwidth, doctor measures it'})"]
    rate = None
    if options.compute_ms:
        told.append(f"computing: {options.compute_ms:g} ms per pass as given, shared out by FLOPs")
    else:
        rate = 1e12 * (options.tflops or ASSUMED_TFLOPS)
        origin = "as given" if options.tflops else "AN ASSUMPTION: give --tflops or --compute-ms"
        told.append(f"computing: {rate / 1e12:g} TFLOP/s ({origin}); no layer under 12 us")
    compute = options.compute_ms / 1e3 if options.compute_ms else None
    return Device(bandwidth * 1e9, rate, compute, 2 * options.batch, options.dtype == "fp16"), told
