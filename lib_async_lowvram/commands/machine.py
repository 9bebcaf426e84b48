"""What `doctor` reads off this machine: versions, the device and its memory, the host's memory, the kind of system.

Nothing is measured and nothing is changed. Called by `doctor` on the main thread.
"""

from __future__ import annotations

import inspect
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from lib_async_lowvram import __version__
from lib_async_lowvram.device.host_memory import ram_bytes
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Streams


def versions() -> dict[str, Any]:
    """Of everything that matters."""
    return {
        "extension": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": getattr(torch.version, "hip", None),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "wsl": is_wsl(),
    }


def is_wsl(release: str | None = None) -> bool:
    """Whether this is Linux inside Windows, where the host's driver decides how much may be pinned. `release`: for tests."""
    release = platform.release() if release is None else release
    return sys.platform.startswith("linux") and ("microsoft" in release.lower() or "WSL_DISTRO_NAME" in os.environ)


def torch_is_too_old() -> bool:
    """Hooks that run whatever happens came with torch 2.1."""
    return "always_call" not in inspect.signature(torch.nn.Module.register_forward_hook).parameters


def describe_device(streams: Streams) -> dict[str, Any]:
    """Name, memory, and for CUDA what runs it. Bytes."""
    found: dict[str, Any] = {"name": streams.name, "simulated": isinstance(streams, SimulatedStreams), "free_bytes": streams.free_memory()}
    if isinstance(streams, SimulatedStreams):
        found["total_bytes"] = streams.total_memory()
        found["set_bandwidth_bytes_per_s"] = streams.bandwidth
    elif streams.device.type == "cuda":
        found["total_bytes"] = torch.cuda.mem_get_info(streams.device)[1]
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(streams.device)))
        found["driver_cuda"] = _driver_cuda()
        found["devices"] = torch.cuda.device_count()
    return found


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver speaks, as torch found it; None where torch does not tell (ROCm)."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    if ask is None or not torch.version.cuda:
        return None
    version = int(ask())
    return f"{version // 1000}.{version % 1000 // 10}" if version > 0 else None


def describe_host() -> dict[str, Any]:
    """Memory and processors of the host. `container_limit_bytes`: of the control group this process is in, None where there is
    none below the machine's memory."""
    ram = ram_bytes()
    limit = _container_limit_bytes()
    return {
        "ram_bytes": ram,
        "container_limit_bytes": limit if limit is not None and limit < ram else None,
        "processors": os.cpu_count(),
    }


def _container_limit_bytes(
    files: tuple[str, ...] = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
) -> int | None:
    for file in files:
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue  # not this kind of control group, or none at all
        if text.isdecimal():
            return int(text)
    return None
