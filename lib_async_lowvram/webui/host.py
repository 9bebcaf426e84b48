"""Is this a host we know, and a device we can drive? Answered once at start, in one line for the user.

Problem: the extension is installed into hosts of many kinds (Forge, forks for DirectML and ZLUDA, Macs, old versions, a
WebUI started without `--lowvram` and `--medvram`). On all of them but ours it must do nothing at all and say so in one line (I6).
Invariant: `detect` never raises and changes nothing: it reads capabilities first (what is there), the version second.
Called from the extension's script, on the thread that imports scripts, before any model is managed. It may make torch
create the CUDA context when it asks for the current device, as the WebUI itself has by then; it makes no stream (I7).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

SIMULATED = "simulated"
DEVICE_VARIABLE = "ASYNC_LOWVRAM_DEVICE"

_SUPPORTED_MINOR = 10
_BEST_EFFORT_MINORS = range(7, 10)

_UNDRIVEN = {
    "privateuseone": "DirectML",
    "mps": "MPS (Apple)",
    "xpu": "XPU (Intel)",
    "npu": "NPU (Ascend)",
}


@dataclass(frozen=True)
class Host:
    """A host we can work in.

    Attributes:
        version: as the host states it, e.g. "1.10.1".
        best_effort: True for 1.7 to 1.9: the seams are there, but nobody has tried every picture.
        device: what weights are moved to, with its index; the CPU when simulated.
        simulated: the simulated device is asked for (ASYNC_LOWVRAM_DEVICE=simulated).
        device_name: for people.
    """

    version: str
    best_effort: bool
    device: torch.device
    simulated: bool
    device_name: str

    @property
    def mover_device(self) -> torch.device | str:
        """What to open the mover's `Streams` with."""
        return SIMULATED if self.simulated else self.device


@dataclass(frozen=True)
class StandDown:
    """Why the extension does nothing here, in one line a user understands."""

    reason: str


class _Unusable(Exception):
    """Carries the reason out of a check."""


def detect(environment: Mapping[str, str] = os.environ) -> Host | StandDown:
    """Look at the host we are running in. Never raises; whatever goes wrong while looking is itself a reason."""
    try:
        _check_capabilities()
        version, best_effort = _check_version()
        device, simulated, name = _check_device(environment)
    except _Unusable as unusable:
        return StandDown(str(unusable))
    except Exception as error:  # a host so different that even looking fails: that, too, is an answer
        return StandDown(f"this host could not be examined ({type(error).__name__}: {error})")
    return Host(version=version, best_effort=best_effort, device=device, simulated=simulated, device_name=name)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # parent package absent, or a module without a spec
        return False


def _check_capabilities() -> None:
    if _has("modules_forge"):
        raise _Unusable("this is Forge, which manages memory itself and does not use --lowvram")
    for module in ("modules.lowvram", "modules.patches", "modules.shared_state", "modules.sd_models"):
        if not _has(module):
            raise _Unusable(f"this WebUI has no {module}: it is not AUTOMATIC1111 1.7 or newer")
    lowvram = importlib.import_module("modules.lowvram")
    for name in ("setup_for_low_vram", "send_everything_to_cpu", "is_enabled"):
        if not callable(getattr(lowvram, name, None)):
            raise _Unusable(f"modules.lowvram of this WebUI has no {name}")
    options = importlib.import_module("modules.shared").cmd_opts
    if not any(getattr(options, name, False) for name in ("lowvram", "medvram", "medvram_sdxl")):
        raise _Unusable("the WebUI was started without --lowvram or --medvram")
    if "always_call" not in inspect.signature(torch.nn.Module.register_forward_hook).parameters:
        raise _Unusable(f"torch {torch.__version__} is too old, 2.1 or newer is needed")


def _check_version() -> tuple[str, bool]:
    told = importlib.import_module("modules.launch_utils").git_tag()
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", str(told).strip())
    if match is None:
        raise _Unusable(f"this WebUI does not tell its version ({str(told)[:40]!r}); known are 1.10.x, and 1.7 to 1.9 as best effort")
    version = match.group(0).lstrip("v")
    major, minor = int(match.group(1)), int(match.group(2))
    if major == 1 and minor == _SUPPORTED_MINOR:
        return version, False
    if major == 1 and minor in _BEST_EFFORT_MINORS:
        return version, True
    raise _Unusable(f"WebUI {version} is unknown to this extension; known are 1.10.x, and 1.7 to 1.9 as best effort")


def _check_device(environment: Mapping[str, str]) -> tuple[torch.device, bool, str]:
    device = importlib.import_module("modules.devices").device
    if device is None:
        raise _Unusable("the WebUI has not chosen a device yet")
    device = torch.device(device)
    wanted = environment.get(DEVICE_VARIABLE, "").strip().lower()
    if wanted not in ("", SIMULATED):
        raise _Unusable(f"{DEVICE_VARIABLE}={wanted[:40]!r} is not understood; the only value is {SIMULATED!r}")
    if wanted == SIMULATED:
        if device.type != "cpu":
            raise _Unusable(f"{DEVICE_VARIABLE}={SIMULATED} needs the WebUI on the CPU (--use-cpu all), but it runs on {device}")
        return torch.device("cpu"), True, SIMULATED
    if device.type in _UNDRIVEN:
        raise _Unusable(f"{_UNDRIVEN[device.type]} devices are not supported yet, only CUDA and ROCm")
    if device.type == "cpu":
        raise _Unusable("the WebUI runs on the CPU: there is no device to move weights to")
    if device.type != "cuda":
        raise _Unusable(f"{device.type} devices are not supported, only CUDA and ROCm")
    if device.index is None:
        # WebUI never calls set_device; with --device-id its device has an index, without one it means torch's current one.
        device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    options = importlib.import_module("modules.shared").cmd_opts
    if "[ZLUDA]" in name or getattr(options, "use_zluda", False):
        raise _Unusable("ZLUDA is not supported yet, only CUDA and ROCm")
    return device, False, f"{device} {name}"
