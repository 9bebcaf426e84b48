"""`demo`: the SD1.5-shaped UNet under stock's moves and under the mover (`bench/demo.py`). Called by `__main__`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lib_async_lowvram.commands.common import CommandError, OutputsDiffer, at_least_one

NEEDS = ("torch", "numpy", "safetensors", "tqdm", "matplotlib")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `demo` to the command line."""
    parser = commands.add_parser(
        "demo",
        help="an SD1.5-shaped UNet under stock's block moves and under the mover: a table, a timeline, a trace",
        description="Run an SD1.5-shaped UNet with seeded weights under stock --lowvram's block moves and under the mover, check that "
        "the outputs are bit for bit equal, print one table, and write summary.json, timeline.png and trace.json.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="where to write (default: demo)")
    parser.add_argument("--device", help="cuda, cuda:1 ... or simulated (default: CUDA where there is one, else simulated)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and inputs (default: 0)")
    parser.add_argument("--passes", type=at_least_one, default=9, help="passes to measure per contender (default: 9)")
    parser.set_defaults(run=run, needs=lambda options: NEEDS, what="the demo")


def run(options: argparse.Namespace) -> None:
    """Raises as in `commands.common`."""
    from lib_async_lowvram.bench.demo import DemoError, DemoSettings, run_demo
    from lib_async_lowvram.device.choose import UnsupportedDevice

    try:
        summary = run_demo(DemoSettings(out=options.out, device=options.device, seed=options.seed, passes=options.passes))
    except (DemoError, UnsupportedDevice) as error:
        raise CommandError(str(error)) from error
    if not summary["bitwise_equal"]:
        raise OutputsDiffer
