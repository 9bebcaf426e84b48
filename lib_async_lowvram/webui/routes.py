"""The extension's own HTTP routes: status, timeline, trial.

`GET /async-lowvram/status`, `GET /async-lowvram/timeline`: only read; no paths, no prompts, since the WebUI's own login does not stand
before routes of extensions. `POST` and `DELETE /async-lowvram/trial` keep the device busy for ten seconds, so they ask for what a
stranger's page cannot send along (a header of our own, which a browser lets nobody add from elsewhere), and for the login where there is
one (`--gradio-auth`).

Called once per start of the UI, with the host's FastAPI application; handlers run on threads of the HTTP server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lib_async_lowvram.log import logger
from lib_async_lowvram.webui.status import complete, jsonable

ROOT = "/async-lowvram"
STATUS, TIMELINE, TRIAL = f"{ROOT}/status", f"{ROOT}/timeline", f"{ROOT}/trial"

HEADER = "x-async-lowvram"

COOKIES = ("access-token", "access-token-unsecure")
"""Where gradio 3 keeps who is logged in."""


class Asked(Protocol):
    """What answers; see `panel.Panel`."""

    def status(self) -> Mapping[str, Any]: ...

    def timeline(self) -> Mapping[str, Any]: ...

    def start_trial(self) -> tuple[bool, str]: ...

    def stop_trial(self) -> None: ...


def add_routes(app: Any, asked: Asked) -> None:
    """Serve them on `app` (a FastAPI application). Routes that we added before, when scripts ran earlier, are replaced."""
    from fastapi.responses import JSONResponse

    # In place: the list belongs to the router.
    app.router.routes[:] = [route for route in app.router.routes if not str(getattr(route, "path", "")).startswith(f"{ROOT}/")]

    # Handlers without annotations but `request`'s: FastAPI would look their names up in this module, where they are not.
    def read_status():
        return JSONResponse(complete(_told(asked.status)))

    def read_timeline():
        found = _told(asked.timeline)
        return JSONResponse(jsonable({"schema": 1, "network": None, "seconds": 0.0, "spans": [], **found}))

    def start_trial(request):
        refused = _refusal(app, request)
        if refused:
            return JSONResponse({"started": False, "reason": refused}, status_code=403)
        started, reason = asked.start_trial()
        return JSONResponse({"started": started, "reason": reason})

    def stop_trial(request):
        refused = _refusal(app, request)
        if refused:
            return JSONResponse({"reason": refused}, status_code=403)
        asked.stop_trial()
        return JSONResponse({"reason": ""})

    from fastapi import Request

    start_trial.__annotations__["request"] = stop_trial.__annotations__["request"] = Request
    app.add_api_route(STATUS, read_status, methods=["GET"])
    app.add_api_route(TIMELINE, read_timeline, methods=["GET"])
    app.add_api_route(TRIAL, start_trial, methods=["POST"])
    app.add_api_route(TRIAL, stop_trial, methods=["DELETE"])


def _told(ask: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return ask()
    except Exception as error:  # the panel must be able to show what is wrong; without its text, which may hold anything
        logger.exception("the status could not be read")
        return {"state": "demoted", "reason": "status could not be read", "last_error": type(error).__name__}


def _refusal(app: Any, request: Any) -> str:
    if request.headers.get(HEADER) != "1":
        return "only the extension's own panel may ask for this"
    if getattr(app, "auth", None) is None:
        return ""
    tokens = getattr(app, "tokens", None) or {}
    return "" if any(request.cookies.get(name) in tokens for name in COOKIES) else "log in first"
