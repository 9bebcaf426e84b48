"""Which device the mover works on.

Problem: the same code drives a CUDA GPU, a ROCm one and the simulated device, and must stand down with one clear line on
everything else rather than guess. The simulated device is also how the real WebUI is driven on a machine without a GPU,
where only the environment can say so:

    ASYNC_LOWVRAM_DEVICE=simulated           use it (where no other device is asked for by name, or the host is on the CPU)
    ASYNC_LOWVRAM_SIM_BANDWIDTH   bytes/s    ASYNC_LOWVRAM_SIM_LATENCY   seconds per copy
    ASYNC_LOWVRAM_SIM_CAPACITY    bytes      ASYNC_LOWVRAM_SIM_JITTER    seconds, at most, before and after each copy
    ASYNC_LOWVRAM_SIM_SEED        of the jitter    ASYNC_LOWVRAM_SIM_POISON    0 or 1: NaN in memory that holds nothing

Values that make no sense are replaced or clamped, and logged. Called once, when a mover is constructed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping

import torch

from .cuda import CudaStreams
from .simulated import SimulatedStreams
from .streams import Streams

logger = logging.getLogger("async_lowvram")

_REASONS = {
    "mps": "MPS: host and device share their memory, so there is nothing to move",
    "xpu": "XPU: nobody has tried it yet; its streams have the right shape",
    "privateuseone": "DirectML: it has no streams, so nothing can be copied beside the computing",
    "cpu": "CPU: there is no device memory to move weights to (ASYNC_LOWVRAM_DEVICE=simulated pretends there is)",
}

# name: (default, least, most)
_SIMULATED = {
    "BANDWIDTH": (12e9, 1e3, 1e15),
    "LATENCY": (20e-6, 0.0, 10.0),
    "JITTER": (0.0, 0.0, 10.0),
    "CAPACITY": (float(8 << 30), float(1 << 20), float(1 << 50)),
    "SEED": (0.0, -(2.0**53), 2.0**53),
    "POISON": (1.0, 0.0, 1.0),
}


class UnsupportedDevice(RuntimeError):
    """The mover cannot work there; the message is one line that says why."""


def open_streams(
    device: torch.device | str | Streams | None = None, environment: Mapping[str, str] | None = None
) -> Streams:
    """The `Streams` for `device`: "cuda:1", a `torch.device`, "simulated", or a `Streams` (returned as it is). None: what
    ASYNC_LOWVRAM_DEVICE names, else CUDA where present, else simulated. Raises `UnsupportedDevice`. `environment`: for
    tests, else `os.environ`."""
    if isinstance(device, Streams):
        return device
    environment = os.environ if environment is None else environment
    named = environment.get("ASYNC_LOWVRAM_DEVICE", "").strip().lower()
    if named == "simulated" and (device is None or _type(device) == "cpu"):
        return _open_simulated(environment)
    if device is None:
        device = named or ("cuda" if torch.cuda.is_available() else "simulated")
    kind = _type(device)
    if kind == "simulated":
        return _open_simulated(environment)
    if kind == "cuda":
        return _open_cuda(torch.device(device))
    raise UnsupportedDevice(_REASONS.get(kind, f"{kind}: unknown device"))


def _type(device: torch.device | str) -> str:
    if isinstance(device, torch.device):
        return device.type
    if device.lower() == "simulated":
        return "simulated"
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise UnsupportedDevice(f"{device!r}: not a device torch knows") from error


def _open_cuda(device: torch.device) -> Streams:
    if not torch.cuda.is_available():
        raise UnsupportedDevice(f"{device}: torch {torch.__version__} finds no CUDA or ROCm device")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UnsupportedDevice(f"{device}: there are only {torch.cuda.device_count()} CUDA devices")
    name = torch.cuda.get_device_name(device)
    if "ZLUDA" in name.upper():
        raise UnsupportedDevice(f"{device} {name}: ZLUDA's streams and events are not complete")
    return CudaStreams(device)


def _open_simulated(environment: Mapping[str, str]) -> SimulatedStreams:
    value = {name: _number(environment, name) for name in _SIMULATED}
    return SimulatedStreams(
        capacity_bytes=int(value["CAPACITY"]),
        bandwidth=value["BANDWIDTH"],
        latency=value["LATENCY"],
        jitter_seconds=value["JITTER"],
        seed=int(value["SEED"]),
        poison=value["POISON"] >= 0.5,
    )


def simulated_link(environment: Mapping[str, str] | None = None) -> tuple[float, float]:
    """(bytes per second, seconds per copy) of the simulated device that `open_streams` would open."""
    environment = os.environ if environment is None else environment
    return _number(environment, "BANDWIDTH"), _number(environment, "LATENCY")


def _number(environment: Mapping[str, str], name: str) -> float:
    """One setting, clamped."""
    default, least, most = _SIMULATED[name]
    variable = f"ASYNC_LOWVRAM_SIM_{name}"
    text = environment.get(variable, "").strip()
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        logger.warning("%s=%r is not a number: using %g", variable, text, default)
        return default
    clamped = min(max(value, least), most)
    if clamped != value:
        logger.warning("%s=%r is out of range: using %g", variable, text, clamped)
    return clamped
