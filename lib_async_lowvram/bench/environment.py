"""What a benchmark ran on: hardware, driver, versions. Read once per run, for the JSON."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from lib_async_lowvram import __version__
from lib_async_lowvram.device.host_memory import ram_bytes
from lib_async_lowvram.device.streams import Streams

PACKAGES = ("diffusers", "accelerate", "mmgp")


def describe(streams: Streams) -> dict[str, Any]:
    """JSON-ready. Keys that mean nothing here are None; no names of machines or users."""
    cuda = streams.device.type == "cuda"
    properties = torch.cuda.get_device_properties(streams.device) if cuda else None
    return {
        "device": streams.name,
        "simulated": not cuda,
        "device_bytes": properties.total_memory if cuda else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "compute_threads": torch.get_num_threads(),
        "ram_bytes": ram_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "async_lowvram": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Of NVIDIA's tool, where that is installed (ROCm has another)."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.split("\n")[0].strip() or None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the name below will do
    return platform.processor() or platform.machine()
