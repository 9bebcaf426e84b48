"""A page like the WebUI's, by the gradio that it pins, with our script and style in it, and the panel's routes answered by a test.

Problem: the panel must work in a page that Gradio builds late, in the browser, from a configuration; a page of our own making would not
show that. So: gradio's own server, tabs and identifiers of the WebUI where the panel looks for them, script tags put into the head and
style sheets before the end of the body as the WebUI does, and a double of its helper functions (webui_double.js).

What the routes answer is `Answers`, which a test changes while the page runs; each request is counted. The server is uvicorn on a thread
of its own; `Answers` is read there and written by the test: plain attributes, replaced as a whole.
"""

from __future__ import annotations

import copy
import json
import socket
import threading
from pathlib import Path
from typing import Any

import fastapi
import gradio
import uvicorn
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "javascript").glob("*.js"))
LANDMARK = b"</head>"


class Answers:
    """What the server says, and what it was asked. `status`: JSON, or an HTTP status code to fail with."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.status: dict[str, Any] | int = 404
        self.timeline: dict[str, Any] | int = {"schema": 1, "network": None, "seconds": 0, "spans": []}
        self.start: tuple[bool, str] = (True, "")
        self.localization: dict[str, str] = {}
        self.helpers = True  # whether the WebUI's callbacks are there
        self.asked: list[str] = []
        self.headers: list[str | None] = []
        self.held: threading.Event | None = None  # while it is there and not set, the status waits for it

    def count(self, what: str) -> int:
        return self.asked.count(what)


def build_page() -> gradio.Blocks:
    with gradio.Blocks(analytics_enabled=False, title="double") as page:
        with gradio.Tabs(elem_id="tabs"):
            for tab in ("txt2img", "img2img"):
                with gradio.TabItem(tab, id=tab, elem_id=f"tab_{tab}"):
                    with gradio.Row(elem_id=f"{tab}_toprow"):
                        gradio.Textbox(label="Prompt", elem_id=f"{tab}_prompt", lines=3)
                        gradio.Button("Generate", elem_id=f"{tab}_generate", variant="primary")
                    with gradio.Row():
                        with gradio.Column(elem_id=f"{tab}_settings"):
                            gradio.Slider(1, 150, 20, label="Steps")
                        with gradio.Column(elem_id=f"{tab}_results"):
                            with gradio.Column(variant="panel", elem_id=f"{tab}_results_panel"):
                                with gradio.Group(elem_id=f"{tab}_gallery_container"):
                                    gradio.Gallery(elem_id=f"{tab}_gallery", show_label=False, height=300)
            with gradio.TabItem("Settings", id="settings", elem_id="tab_settings"):
                gradio.Markdown("nothing of ours here")
        gap = "\u2000•\u2000"
        versions = ["python: 3.10.6", "torch: 2.1.2+cu121", "xformers: N/A", "gradio: 3.41.2", "checkpoint: <a>6ce0161689</a>"]
        link = '<a href="https://example.invalid/commit/abc">v1.10.1</a>'
        gradio.HTML(f'<div class="versions">{gap.join([f"version: {link}", *versions])}</div>')
    return page


def add_routes(app: fastapi.FastAPI, answers: Answers, prefix: str) -> None:
    base = f"{prefix}/async-lowvram"

    def reply(asked: Any) -> Response:
        if isinstance(asked, int):
            return PlainTextResponse("an error page", status_code=asked)
        return JSONResponse(copy.deepcopy(asked))

    def status():
        answers.asked.append("status")
        held = answers.held
        if held is not None:
            held.wait(30)
        return reply(answers.status)

    def timeline():
        answers.asked.append("timeline")
        return reply(answers.timeline)

    def start(request: fastapi.Request):
        answers.asked.append("start")
        answers.headers.append(request.headers.get("x-async-lowvram"))
        started, reason = answers.start
        return reply({"started": started, "reason": reason})

    def stop(request: fastapi.Request):
        answers.asked.append("stop")
        answers.headers.append(request.headers.get("x-async-lowvram"))
        return Response(status_code=204)

    for function in (start, stop):  # a name as text would be looked up in this module, where it is not
        function.__annotations__["request"] = fastapi.Request
    app.add_api_route(f"{base}/status", status, methods=["GET"])
    app.add_api_route(f"{base}/timeline", timeline, methods=["GET"])
    app.add_api_route(f"{base}/trial", start, methods=["POST"])
    app.add_api_route(f"{base}/trial", stop, methods=["DELETE"])


def add_files(app: fastapi.FastAPI, answers: Answers, prefix: str) -> None:
    """The files, and the tags for them in gradio's page."""
    files = {path.name: path for path in [*SCRIPTS, ROOT / "style.css", Path(__file__).with_name("webui_double.js")]}

    def serve(name: str):
        return FileResponse(files[name])

    serve.__annotations__["name"] = str
    app.add_api_route(f"{prefix}/our-files/{{name}}", serve, methods=["GET"])

    @app.middleware("http")
    async def with_tags(request: Any, call_next: Any) -> Response:
        answer = await call_next(request)
        if not answer.headers.get("content-type", "").startswith("text/html"):
            return answer
        body = b"".join([part async for part in answer.body_iterator])
        names = [*(["webui_double.js"] if answers.helpers else []), *(path.name for path in SCRIPTS)]
        tags = f"<script>window.localization = {json.dumps(answers.localization)}</script>"
        tags += "".join(f'<script type="text/javascript" src="our-files/{name}"></script>' for name in names)
        body = body.replace(LANDMARK, tags.encode() + LANDMARK, 1)
        body = body.replace(b"</body>", b'<link rel="stylesheet" href="our-files/style.css"></body>', 1)
        headers = {key: value for key, value in answer.headers.items() if key.lower() != "content-length"}
        return Response(body, status_code=answer.status_code, headers=headers)


class Server:
    """The page at `address`, until `close`."""

    def __init__(self, answers: Answers, prefix: str = "") -> None:
        app = fastapi.FastAPI()
        add_routes(app, answers, prefix)
        add_files(app, answers, prefix)
        app = gradio.mount_gradio_app(app, build_page(), path=prefix)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}{prefix}/"

    def close(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join(30)
        self._socket.close()
