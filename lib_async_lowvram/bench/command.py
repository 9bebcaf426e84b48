"""The `bench` command: its arguments, and what they run.

Problem: `python -m lib_async_lowvram --help` and messages about wrong arguments must come at once, so nothing here imports
torch before the arguments are known to be good.

`add_parser` is called by `__main__`; `_run` on the main thread, with the parsed arguments. Exit codes as in `__main__`.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDS = ("torch", "numpy", "safetensors", "tqdm")


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `bench` to the subparsers of the command line."""
    bench = commands.add_parser(
        "bench",
        help="measurements: what a change of LoRA costs",
        description="Workload `patching`: the first passes after a LoRA is used, changed and removed, under stock's block moves and "
        "under the mover, as a table; outputs are compared bit for bit.",
    )
    bench.add_argument("workload", choices=["patching"])
    bench.add_argument("--device", help="cuda, cuda:1 ... or simulated (default: CUDA where there is one, else simulated)")
    bench.add_argument("--seed", type=int, default=0, help="of weights, inputs and LoRA (default: 0)")
    bench.add_argument("--rounds", type=_at_least_one, default=3, help="how often each event is measured (default: 3)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    bench.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    missing = [package for package in NEEDS if find_spec(package) is None]
    if missing:
        return _failed(f"the benchmark needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")
    from lib_async_lowvram.bench.patching import PatchingSettings, run_patching
    from lib_async_lowvram.device.choose import UnsupportedDevice

    try:
        result = run_patching(PatchingSettings(device=options.device, seed=options.seed, rounds=options.rounds, json=options.json))
    except (UnsupportedDevice, OSError) as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if not result["bitwise_equal"]:
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
