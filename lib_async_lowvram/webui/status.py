"""What the status answers, always the same keys: `complete` makes of what is known what docs/status.schema.json says.

Invariant: always valid JSON (no NaN, no infinity), no paths and no prompts (the route is not behind --api-auth). Pure but for the size of
the process. Called on threads of the HTTP server by `routes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from lib_async_lowvram import __version__
from lib_async_lowvram.webui.memory_report import memory_of

EMPTY: dict[str, Any] = {
    "schema": 1,
    "version": __version__,
    "generating": False,
    "state": "standing_down",
    "reason": "",
    "device": None,
    "budget_bytes": 0,
    "resident_bytes": 0,
    "ring_bytes": 0,
    "pinned_bytes": 0,
    "pinned_limit_bytes": 0,
    "passes": 0,
    "hits": 0,
    "misses": 0,
    "refetches": 0,
    "write_backs": 0,
    "adopted": 0,
    "streamed_bytes_per_pass": 0,
    "bandwidth_bytes_per_s": None,
    "pass_seconds": None,
    "stall_seconds": None,
    "limit_seconds": None,
    "best_schedule_seconds": None,
    "efficiency": None,
    "schedule_efficiency": None,
    "bound": None,
    "preview": {"decoded": 0, "skipped": 0, "decode_seconds": 0.0, "errors": 0, "peak_weight_bytes": 0},
    "last_error": None,
    "advice": "",
    "advices": [],
    "messages": [],
    "restart": "",
    "stock_pass_seconds": None,
    "worst_stall": None,
    "vram": None,
    "disk": None,
    "trial": {"state": "idle", "progress": 0.0, "reason": "", "result": None},
    "large": None,
    # Beyond DESIGN.md: what a test or a curious user holds the promises against.
    "networks": {},
    "learning_passes": 0,
    "streamed_bytes": 0,
    "host_waits": 0,
    "placement_faults": None,
    "peak_weight_bytes": 0,
    "learning_peak_bytes": 0,
    "allocated_bytes": 0,
    "sheds": 0,
    "retries": 0,
    "retries_failed": 0,
    "host_bytes": 0,
}

# Absolute paths of either kind, at the start or after a space or quote: an error message of torch or the OS may hold one.
_PATHS = re.compile(r"(?:(?<=^)|(?<=[\s'\"(=:]))(?:[A-Za-z]:)?[\\/](?:[^\s'\":,;()]+)")


def complete(status: Mapping[str, Any]) -> dict[str, Any]:
    """`status` with every key of the contract and nothing JSON cannot hold."""
    known = {**EMPTY, **status}
    return jsonable({**known, "memory": memory_of(known)})


def jsonable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _PATHS.sub("<path>", value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    return jsonable(str(value))
