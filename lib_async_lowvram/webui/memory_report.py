"""Where memory goes: the most that each region took of the device and of main memory, weights apart from activations.

Made from the status's other figures, for `GET /async-lowvram/status`. Bytes; None where nobody counts. Pure but for `process`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

REGIONS = {"text": "text encoder", "unet": "UNet", "vae": "VAE"}
"""How a network's name begins -> what people call it."""


def region_of(network: str) -> str:
    """"unet#2", of the second model kept in memory -> "UNet"; "text_2", SDXL's second -> "text encoder". Others keep their names."""
    name = network.split("#")[0]
    return REGIONS.get(name.split("_")[0], name)


def memory_of(status: Mapping[str, Any]) -> dict[str, Any]:
    """Region -> device_weights, device_activations (the most at once), host_weights, host_pinned (now, of all models kept in memory).
    "previews" and "process" beside them."""
    regions: dict[str, dict[str, int | None]] = {}
    for name, network in (status.get("networks") or {}).items():
        found = regions.setdefault(region_of(str(name)), dict.fromkeys(("device_weights", "device_activations"), None))
        for key, source in (("device_weights", "peak_weight_bytes"), ("device_activations", "peak_activation_bytes")):
            value = network.get(source)
            if value is not None:
                found[key] = max(found[key] or 0, value)
        for key, source in (("host_weights", "weight_bytes"), ("host_pinned", "pinned_bytes")):
            found[key] = (found.get(key) or 0) + network.get(source, 0)
    preview = status.get("preview") or {}
    return {**regions, "previews": {"device_weights": preview.get("peak_weight_bytes", 0)}, "process": process()}


def process() -> dict[str, int | None]:
    """Main memory of this process: the most so far, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return {"host_peak": None}
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage(2) counts in
    return {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
