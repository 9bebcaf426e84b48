"""`doctor`: what the extension would do on this machine, and why.

Problem: whether weights can travel beside the computing depends on the device, on what the system lets one pin, on the link
and on how much memory is free, and when it does not work one wants to know which. This looks at each, measures what can be
measured in a few seconds, resolves the automatic budget with the mover's own code, and says what would happen.

Settings of the WebUI (its attention, `--lowvram` itself) cannot be seen from here: where to look is told.

Called by `__main__`.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_async_lowvram.commands.common import CommandError, check_writable, write_json
from lib_async_lowvram.commands.doctor_memory import DEFAULT_URL, ask, picture_lines, pictures, table

if TYPE_CHECKING:
    from lib_async_lowvram.device.streams import Streams

SCHEMA = 1
MIB = 1 << 20

COLUMNS = 120

IN_THE_WEBUI = (
    "a line `standing down: ...` at its start says why the extension does nothing; GET /async-lowvram/status tells what it does. "
    "Under Doggettx and sub-quadratic attention (Settings > Optimizations) pictures depend on how much memory is free; under "
    "sdp-no-mem they do not."
)
"""What cannot be seen from here."""

UNETS = (("SD1.5", 1_719_041_928), ("SDXL", 5_134_927_368))
"""Weights in half precision, bytes: twice the published parameter counts."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="what the extension would do on this machine, and why",
        description="Look at this machine's device, memory and link, measure what can be measured in a few seconds, and say what the "
        "extension would do. Changes nothing.",
    )
    parser.add_argument("--device", help="cuda, cuda:1 ... or simulated (default: what the WebUI would use; without a GPU, simulated)")
    parser.add_argument(
        "--memory", action="store_true", help="also where memory goes: what a running WebUI has measured, and what large pictures take"
    )
    parser.add_argument("--url", help=f"of the running WebUI, for --memory (default: {DEFAULT_URL}, if one answers there)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.set_defaults(run=run, needs=lambda options: ("torch",), what="the doctor")


def run(options: argparse.Namespace) -> None:
    """Raises as in `commands.common`."""
    import torch

    from lib_async_lowvram.device.choose import UnsupportedDevice, open_streams

    check_writable(options.json)
    try:
        streams = open_streams(options.device)
    except UnsupportedDevice as error:
        raise CommandError(str(error)) from error
    except RuntimeError as error:  # a driver that does not start, or a device that somebody else has filled
        raise CommandError(f"{options.device or 'the device'} cannot be used: {_first_line(error)}") from error
    try:
        figures = examine(streams, asked_for=options.device is not None)
        if options.memory:
            figures["memory"] = _memory(streams.free_memory(), options.url)
    except torch.cuda.OutOfMemoryError as error:
        raise CommandError(f"{streams.name} has no memory left to examine it with: {_first_line(error)}") from error
    finally:
        streams.close()
    print(describe(figures))
    if options.memory:
        print(_describe_memory(figures["memory"]))
    if options.json is not None:
        write_json(options.json, figures)


def examine(streams: Streams, asked_for: bool) -> dict[str, Any]:
    """Everything as one JSON-ready dictionary. `asked_for`: the user named the device."""
    from lib_async_lowvram.commands.machine import describe_device, describe_host, versions
    from lib_async_lowvram.commands.probing import probe

    found: dict[str, Any] = {
        "schema": SCHEMA,
        "command": "doctor",
        "versions": versions(),
        "device": describe_device(streams),
        "host": describe_host(),
        "measured": probe(streams),
        "budget": _budget(streams),
    }
    found["state"], found["reason"] = _verdict(found, asked_for)
    found["warnings"] = _warnings(found)
    return found


def _budget(streams: Streams) -> dict[str, Any]:
    """The automatic budget as the mover would resolve it now, with no model loaded, and its terms; bytes."""
    from lib_async_lowvram.config import OffloadConfig
    from lib_async_lowvram.context import Context
    from lib_async_lowvram.device.host_memory import HostMemory

    config = OffloadConfig()
    return {
        "free_bytes": streams.free_memory(),
        "activation_bytes": streams.activation_growth(),
        "reserve_bytes": config.reserve_bytes,
        "budget_bytes": Context(streams, HostMemory(streams), config).budget(),
    }


def _memory(total_bytes: int, url: str | None) -> dict[str, Any]:
    """"webui": as the status tells it, or None; "why_not": then; "pictures": see `doctor_memory.pictures`. A quarter of the device is
    left to weights. Raises `CommandError` where the user said where the WebUI is, and it is not."""
    measured, why_not = None, ""
    try:
        measured = ask(url or DEFAULT_URL)["memory"]
    except CommandError as error:
        if url is not None:
            raise
        why_not = str(error)
    room = total_bytes - total_bytes // 4
    return {"url": url or DEFAULT_URL, "webui": measured, "why_not": why_not, "room_bytes": room, "pictures": pictures(room)}


def _describe_memory(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            "",
            f"memory by region, as the WebUI at {found['url']} has measured it; on the GPU the most so far:",
            *("  " + line for line in (table(found["webui"]) if found["webui"] is not None else [found["why_not"]])),
            "",
            "activations of one picture, half precision, fused attention (a formula, not measured); three quarters of what is free,",
            f"{_mb(found['room_bytes'])}, for them:",
            *("  " + line for line in picture_lines(found["pictures"], found["room_bytes"])),
        ]
    )


def _verdict(found: dict[str, Any], asked_for: bool) -> tuple[str, str]:
    """(state, reason), as the status would say."""
    from lib_async_lowvram.commands.machine import torch_is_too_old
    from lib_async_lowvram.device.choose import UnsupportedDevice, open_streams

    if torch_is_too_old():
        return "standing_down", f"torch {found['versions']['torch']} is too old, 2.1 or newer is needed"
    if found["device"]["simulated"] and not asked_for and not _simulation_is_set():
        for kind in _other_devices():
            try:
                open_streams(kind).close()
            except UnsupportedDevice as error:
                return "standing_down", str(error)
        return (
            "standing_down",
            "torch finds no CUDA or ROCm device, so the WebUI would compute on the CPU; measured on the simulated device",
        )
    return "active", ""


def _simulation_is_set() -> bool:
    return os.environ.get("ASYNC_LOWVRAM_DEVICE", "").strip().lower() == "simulated"


def _other_devices() -> list[str]:
    """Kinds of device that torch finds here and that the mover knows not to work on."""
    import torch

    present = {"mps": getattr(torch.backends, "mps", None), "xpu": getattr(torch, "xpu", None)}
    return [kind for kind, backend in present.items() if backend is not None and backend.is_available()]


def _warnings(found: dict[str, Any]) -> list[str]:
    """What makes it slower than it could be, or may."""
    measured, budget, host = found["measured"], found["budget"], found["host"]
    warnings = [*measured["problems"]]
    if measured["pinning_works"] is False:
        warnings.append(
            "host memory could not be pinned: weights would travel at the pageable speed, and the host would wait for each copy"
        )
    if found["versions"]["wsl"]:
        warnings.append("this is WSL: Windows decides how much may be pinned, often much less than the limit below")
    if host["container_limit_bytes"] is not None and measured["pinned_limit_bytes"] > host["container_limit_bytes"] // 2:
        warnings.append(
            f"this process may use {_mb(host['container_limit_bytes'])} of the machine's {_mb(host['ram_bytes'])}: set the pinned memory "
            "limit in Settings well below that, the automatic one goes by the machine"
        )
    link = measured["bandwidth_bytes_per_s"] or {}
    if not found["device"]["simulated"] and link.get("pinned_to_device") and link["pinned_to_device"] < link["pageable_to_device"]:
        warnings.append(
            "pinned copies were slower than pageable ones: something else uses the link or the memory, look again on an idle machine"
        )
    if not budget["budget_bytes"]:
        warnings.append(
            f"less than the reserve of {_mb(budget['reserve_bytes'])} is free: the budget is raised to the least that works (two of the "
            "largest layers), and pictures may run out of memory; close other programs"
        )
    return warnings


def describe(found: dict[str, Any]) -> str:
    """For people."""
    about, device, host, measured, budget = (found[key] for key in ("versions", "device", "host", "measured", "budget"))
    runtime = f"CUDA {about['torch_cuda']}" if about["torch_cuda"] else f"ROCm {about['torch_hip']}" if about["torch_hip"] else "CPU only"
    lines = [
        ("versions", f"Async LowVRAM {about['extension']}, Python {about['python']}, torch {about['torch']} ({runtime})"),
        (
            "system",
            about["system"] + (", WSL" if about["wsl"] else "") + f", {host['processors']} processors, RAM {_mb(host['ram_bytes'])}",
        ),
        ("device", device["name"] + _more(device)),
        ("its memory", f"{_mb(device['free_bytes'])} free of {_mb(device['total_bytes'])}"),
        ("pinning", _pinning(measured)),
        *_link_lines(measured),
        (
            "host's costs",
            f"launch {_us(measured['launch_seconds'])}, event and wait {_us(measured['event_wait_seconds'])}, a small kernel until the "
            f"host knows {_us(measured['kernel_round_trip_seconds'])}",
        ),
        (
            "automatic budget",
            f"{_mb(budget['budget_bytes'])} = {_mb(budget['free_bytes'])} free - {_mb(budget['activation_bytes'])} that pictures were "
            f"seen to need - {_mb(budget['reserve_bytes'])} reserve, rounded down; this is before pictures take their share",
        ),
        *(("", _unet_line(name, nbytes, found)) for name, nbytes in UNETS),
        ("verdict", _verdict_line(found)),
    ]
    lines += [("warning", warning) for warning in found["warnings"]]
    lines.append(("in the WebUI", IN_THE_WEBUI))
    indent = " " * (max(len(name) for name, _ in lines) + 2)
    return "\n".join(
        "\n".join(textwrap.wrap(line, COLUMNS, initial_indent=name.ljust(len(indent)), subsequent_indent=indent, break_on_hyphens=False))
        for name, line in lines
    )


def _more(device: dict[str, Any]) -> str:
    if device["simulated"]:
        return f" (no real device: a link set to {device['set_bandwidth_bytes_per_s'] / 1e9:g} GB/s, computing on the CPU)"
    more = [f"compute capability {device['capability']}"] if "capability" in device else []
    more += [f"driver for CUDA {device['driver_cuda']}"] if device.get("driver_cuda") else []
    more += [f"one of {device['devices']} devices"] if device.get("devices", 1) > 1 else []
    return f" ({', '.join(more)})" if more else ""


def _pinning(measured: dict[str, Any]) -> str:
    limit = f"limit {_mb(measured['pinned_limit_bytes'])}"
    if measured["pinning_works"] is None:
        return f"not tried, {limit}"
    return f"{'works' if measured['pinning_works'] else 'REFUSED'} (tried {_mb(measured['probe_bytes'])}), {limit}"


def _link_lines(measured: dict[str, Any]) -> list[tuple[str, str]]:
    link = measured["bandwidth_bytes_per_s"]
    if link is None:
        return [("link", "not measured")]

    def speed(key: str) -> str:
        return f"{link[key] / 1e9:.2f} GB/s" if link[key] else "not possible"

    return [
        (f"link, {kind}", f"{speed(f'{kind}_to_device')} to the device, {speed(f'{kind}_to_host')} back") for kind in ("pinned", "pageable")
    ]


def _unet_line(name: str, nbytes: int, found: dict[str, Any]) -> str:
    """What the budget means for a well-known UNet."""
    rest = max(0, nbytes - found["budget"]["budget_bytes"])
    if not rest:
        return f"{name}'s UNet ({_mb(nbytes)} in half precision) would stay on the device as a whole"
    link = found["measured"]["bandwidth_bytes_per_s"] or {}
    speed = link.get("pinned_to_device") or link.get("pageable_to_device")
    seconds = f": at least {1e3 * rest / speed:.0f} ms of copying" if speed else ""
    return f"{name}'s UNet ({_mb(nbytes)} in half precision): {_mb(rest)} or more would stream in every pass{seconds}"


def _verdict_line(found: dict[str, Any]) -> str:
    if found["state"] == "active" and found["device"]["simulated"]:
        return (
            "active: in a WebUI on the CPU, started with --lowvram and ASYNC_LOWVRAM_DEVICE=simulated, weights would travel while it "
            "computes"
        )
    if found["state"] == "active":
        return "active: in a WebUI started with --lowvram, weights would travel while the device computes"
    return f"standing down: {found['reason']}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _mb(nbytes: float) -> str:
    return f"{nbytes / MIB:.0f} MB"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us"
