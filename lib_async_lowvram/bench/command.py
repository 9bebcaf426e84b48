"""The `bench` command: its arguments, and what they run.

Problem: `python -m lib_async_lowvram --help` and messages about wrong arguments must come at once, so nothing here imports
torch before the arguments are known to be good.

`add_parser` is called by `__main__`; `_run` on the main thread, with the parsed arguments. Exit codes as in `__main__`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lib_async_lowvram.bench.options import (
    CONTENDERS,
    DEFAULT_BUDGETS,
    MODELS,
    BenchError,
    parse_budgets,
    parse_contenders,
    parse_models,
    parse_numbers,
)

NEEDS = ("torch", "numpy", "safetensors", "tqdm")
WORKLOADS = ("unet", "loading", "patching", "overhead")

_COMMON = ("device", "seed", "json")
_TAKEN = {
    "unet": (*_COMMON, "rounds", "model", "contenders", "budget", "passes", "batch", "link_factor", "seconds", "markdown", "png"),
    "loading": (*_COMMON, "rounds", "seconds", "markdown"),
    "patching": (*_COMMON, "rounds"),
    "overhead": ("json", "passes", "rounds"),
    "--suite": ("device", "seed", "json_dir", "seconds"),
    "--from": ("markdown", "png"),
}
"""What each of them takes: anything else given beside it is told, not ignored."""

_OPTIONS = tuple(dict.fromkeys(option for options in _TAKEN.values() for option in options))


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `bench` to the subparsers of the command line."""
    bench = commands.add_parser(
        "bench",
        help="measurements: the mover beside stock's moves and other offloaders; unloading and loading; what a change of LoRA costs",
        description="Workload unet (the default): passes of a UNet of SD1.5's or SDXL's shape under each contender and budget, in "
        "turn, every output compared bit for bit. loading: unloading and loading all of SDXL's components. patching: the first "
        "passes after a LoRA is used, changed and removed. overhead: what the host spends in hooks per pass. "
        "docs/benchmarks.md tells the method.",
    )
    several = {"action": "append", "metavar": "A,B"}
    bench.add_argument("workload", nargs="?", choices=WORKLOADS, help="default: unet")
    bench.add_argument("--device", help="cuda, cuda:1 ... or simulated (default: CUDA where there is one, else simulated)")
    bench.add_argument("--model", **several, help=f"{', '.join(MODELS)} (default: sd15); on the simulated device narrower than real")
    bench.add_argument("--contenders", **several, help=f"{', '.join(CONTENDERS)}, or all (default: all)")
    bench.add_argument(
        "--budget",
        **several,
        help=f"device memory for weights, for async: MB, N%% of the weights, or equal: as much as each other contender "
        f"was seen to take (default: {DEFAULT_BUDGETS.replace('%', '%%')})",
    )
    bench.add_argument("--passes", type=_at_least_one, help="timed passes per round (default: 5)")
    bench.add_argument("--rounds", type=_at_least_one, help="rounds, in which the contenders take turns (default: 3)")
    bench.add_argument("--batch", **several, help="latent pictures per pass (default: 2: one picture and its negative prompt)")
    bench.add_argument(
        "--link-factor",
        **several,
        help="simulated device: the link's speed, 1 where streaming all weights takes as long as computing (default: 1)",
    )
    bench.add_argument("--seed", type=int, help="of weights and inputs (default: 0)")
    bench.add_argument("--seconds", type=float, help="time to keep to, by fewer repeats and then fewer rows (default: none)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    bench.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    bench.add_argument("--png", type=Path, metavar="FILE", help="draw time against budget there")
    bench.add_argument("--from", dest="stored", type=Path, action="append", metavar="FILE", help="no run: show a stored JSON")
    bench.add_argument("--suite", choices=["gpu", "tiny"], help="no single run: the whole set (gpu: within 8 minutes)")
    bench.add_argument("--json-dir", type=Path, metavar="FOLDER", help="where --suite writes")
    bench.set_defaults(run=_run, needs=needs, what="the benchmark")


def needs(options: argparse.Namespace) -> tuple[str, ...]:
    """Packages that these arguments need."""
    draws = ("matplotlib",) if options.png or options.suite else ()
    return draws if options.stored else (*NEEDS, *draws)


def _run(options: argparse.Namespace) -> int:
    try:
        kind = _kind(options)
        run = {"--from": _from, "--suite": _suite, "patching": _patching, "overhead": _overhead}.get(kind, _bench)
        return run(options, kind)
    except BenchError as error:
        return _failed(str(error))
    except OSError as error:
        return _failed(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted; what was measured before is in the JSON", file=sys.stderr)
        return 130


def _kind(options: argparse.Namespace) -> str:
    """What is asked for. Raises `BenchError` when it does not take something else that was given."""
    asked = {"--from": options.stored, "--suite": options.suite, options.workload: options.workload}
    kinds = [kind for kind, given in asked.items() if given]
    if len(kinds) > 1:
        raise BenchError(f"{kinds[0]} and {kinds[1]} cannot be combined")
    kind = kinds[0] if kinds else "unet"
    for option in _OPTIONS:
        if getattr(options, option) is not None and option not in _TAKEN[kind]:
            raise BenchError(f"{kind} takes no --{option.replace('_', '-')}")
    return kind


def _from(options: argparse.Namespace, kind: str) -> int:
    from lib_async_lowvram.bench.results import all_equal
    from lib_async_lowvram.bench.stored import show_stored

    return _verdict(all_equal(show_stored(options.stored, options.markdown, options.png)))


def _suite(options: argparse.Namespace, kind: str) -> int:
    if options.json_dir is None:
        raise BenchError("--suite needs --json-dir FOLDER")
    seconds = _seconds(options)
    from lib_async_lowvram.bench.results import all_equal
    from lib_async_lowvram.bench.suite import run_suite
    from lib_async_lowvram.device.choose import UnsupportedDevice

    try:
        documents = run_suite(options.suite, options.json_dir, device=options.device, seed=options.seed or 0, seconds=seconds)
    except UnsupportedDevice as error:
        return _failed(str(error))
    return _verdict(all(map(all_equal, documents)))


def _bench(options: argparse.Namespace, kind: str) -> int:
    # Wrong arguments are told before torch is imported.
    given = {
        "models": parse_models(options.model or ["sd15"]) if kind == "unet" else (),
        "contenders": parse_contenders(options.contenders or ["all"]),
        "budgets": parse_budgets(options.budget or [DEFAULT_BUDGETS]),
        "batches": tuple(map(int, parse_numbers(options.batch or ["2"], "--batch", 1, 256))),
        "link_factors": parse_numbers(options.link_factor or ["1"], "--link-factor", 0.001, 1000),
        "seconds": _seconds(options),
    }
    from lib_async_lowvram.bench.results import all_equal
    from lib_async_lowvram.bench.running import BenchSettings, run_bench
    from lib_async_lowvram.device.choose import UnsupportedDevice

    settings = BenchSettings(
        **given,
        device=options.device,
        passes=options.passes or 5,
        rounds=options.rounds or 3,
        seed=options.seed or 0,
        loading=kind == "loading",
        json=options.json,
        markdown=options.markdown,
        png=options.png,
    )
    try:
        return _verdict(all_equal(run_bench(settings)))
    except UnsupportedDevice as error:
        return _failed(str(error))


def _patching(options: argparse.Namespace, kind: str) -> int:
    from lib_async_lowvram.bench.patching import PatchingSettings, run_patching
    from lib_async_lowvram.device.choose import UnsupportedDevice

    settings = PatchingSettings(device=options.device, seed=options.seed or 0, rounds=options.rounds or 3, json=options.json)
    try:
        return _verdict(run_patching(settings)["bitwise_equal"])
    except UnsupportedDevice as error:
        return _failed(str(error))


def _overhead(options: argparse.Namespace, kind: str) -> int:
    from lib_async_lowvram.bench.overhead import OverheadSettings, run_overhead

    run_overhead(OverheadSettings(passes=options.passes or 50, rounds=options.rounds or 5, json=options.json))
    return 0


def _seconds(options: argparse.Namespace) -> float | None:
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        raise BenchError(f"--seconds {options.seconds:g}: must be above 0")
    return options.seconds


def _verdict(equal: bool) -> int:
    if not equal:
        print("error: the outputs are not bit for bit equal to the resident model's", file=sys.stderr)
    return 0 if equal else 1


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value
