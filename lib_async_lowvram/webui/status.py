"""`GET /async-lowvram/status`: what the mover does, as JSON, also when it does nothing.

Invariant: always the keys of DESIGN.md "Status", always valid JSON (no NaN, no infinity), no paths and no prompts (the route
is not behind --api-auth), no side effects: asking never loads a model or opens a device.
Called on threads of the HTTP server; the mover's own `status` may be asked from any thread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lib_async_lowvram import __version__
from lib_async_lowvram.webui.memory_report import memory_of

PATH = "/async-lowvram/status"

EMPTY: dict[str, Any] = {
    "version": __version__,
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
    "bandwidth_bytes_per_s": 0.0,
    "pass_seconds": 0.0,
    "stall_seconds": 0.0,
    "limit_seconds": 0.0,
    "best_schedule_seconds": 0.0,
    "efficiency": 0.0,
    "schedule_efficiency": 0.0,
    "bound": None,
    "preview": {"decoded": 0, "skipped": 0, "decode_seconds": 0.0, "errors": 0, "peak_weight_bytes": 0},
    "last_error": None,
    "advice": "",
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
    return _jsonable({**known, "memory": memory_of(known)})


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _PATHS.sub("<path>", value)
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(item) for item in value]
    return _jsonable(str(value))


def add_route(app: Any, ask: Callable[[], Mapping[str, Any]]) -> None:
    """Serve `ask()` on `app` (a FastAPI application). A route we added before, when scripts ran earlier, is replaced."""
    from fastapi.responses import JSONResponse

    # In place: the list belongs to the router.
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) != PATH]

    def read_status():  # without an annotation: FastAPI would look its name up in this module, where it is not
        try:
            answer = complete(ask())
        except Exception as error:  # the panel must be able to show what is wrong
            answer = complete({"state": "demoted", "reason": "status could not be read", "last_error": type(error).__name__})
        return JSONResponse(answer)

    app.add_api_route(PATH, read_status, methods=["GET"])
