"""The command line: `python -m lib_async_lowvram demo`, `... bench`.

Exit codes: 0 all well; 1 outputs differ from the resident model's; 2 it could not run: wrong arguments, a missing
package, a device that cannot be used, an output folder that cannot be written. Importing this module imports nothing heavy,
so that `--help` and messages about missing packages come at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lib_async_lowvram import __version__
from lib_async_lowvram.bench.command import add_parser as add_bench_parser

DEMO_NEEDS = ("torch", "numpy", "safetensors", "tqdm", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (argparse exits with 2 by itself for wrong arguments)."""
    parser = argparse.ArgumentParser(prog="python -m lib_async_lowvram", description="Async LowVRAM: asynchronous weight moving.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="an SD1.5-shaped UNet under stock's block moves and under the mover: a table, a timeline, a trace",
        description="Run an SD1.5-shaped UNet with seeded weights under stock --lowvram's block moves and under the mover, check that "
        "the outputs are bit for bit equal, print one table, and write summary.json, timeline.png and trace.json.",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="where to write (default: demo)")
    demo.add_argument("--device", help="cuda, cuda:1 ... or simulated (default: CUDA where there is one, else simulated)")
    demo.add_argument("--seed", type=int, default=0, help="of the weights and inputs (default: 0)")
    demo.add_argument("--passes", type=_at_least_one, default=9, help="passes to measure per contender (default: 9)")
    demo.set_defaults(run=_demo)
    add_bench_parser(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


def _demo(options: argparse.Namespace) -> int:
    missing = [package for package in DEMO_NEEDS if find_spec(package) is None]
    if missing:
        return _failed(f"the demo needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")
    from lib_async_lowvram.bench.demo import DemoError, DemoSettings, run_demo
    from lib_async_lowvram.device.choose import UnsupportedDevice

    try:
        summary = run_demo(DemoSettings(out=options.out, device=options.device, seed=options.seed, passes=options.passes))
    except (DemoError, UnsupportedDevice) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if not summary["bitwise_equal"]:
        print("error: the outputs are not bit for bit equal to the resident model's", file=sys.stderr)
        return 1
    return 0


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
