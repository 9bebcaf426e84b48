"""A running WebUI over HTTP, for the end-to-end tests: standard library and Pillow only."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
import urllib.request
from typing import Any

from PIL import Image

TIMEOUT_S = 900


class Server:
    """One WebUI started with `--api`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=TIMEOUT_S) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)

    def status(self) -> dict[str, Any]:
        return self.get("/async-lowvram/status")

    def set_options(self, **options: Any) -> None:
        self.post("/sdapi/v1/options", options)

    def resident_memory(self) -> int:
        """Bytes of main memory the server's process holds."""
        return int(self.get("/sdapi/v1/memory")["ram"]["used"])

    def pictures(self, kind: str, job: dict[str, Any]) -> list[str]:
        """Run a job ("txt2img" or "img2img"); one hash of the pixels for each picture."""
        return [hash_of(picture) for picture in self.post(f"/sdapi/v1/{kind}", job)["images"]]

    def extras(self, order: dict[str, Any]) -> list[str]:
        """Upscale one picture outside of any generation; its hash."""
        return [hash_of(self.post("/sdapi/v1/extra-single-image", order)["image"])]

    def wait_for_step(self, step: int, job: threading.Thread) -> None:
        """Until the running job has sampled `step` steps; fails when the job ends first."""
        while self.get("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] < step:
            if not job.is_alive():
                raise AssertionError(f"the job ended before step {step}")
            time.sleep(0.02)  # polling a server, not synchronising: the answer decides


def hash_of(picture: str) -> str:
    """Of the decoded pixels: the file around them holds texts that may differ."""
    image = Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[-1]))).convert("RGB")
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16]


def encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Background:
    """A job running on a thread; `result` joins it and gives its pictures, or raises what it raised."""

    def __init__(self, server: Server, kind: str, job: dict[str, Any]) -> None:
        self._outcome: list[Any] = []
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(server, kind, job))
        self.thread.start()

    def _run(self, server: Server, kind: str, job: dict[str, Any]) -> None:
        try:
            self._outcome = server.pictures(kind, job)
        except BaseException as error:
            self._error = error

    def result(self) -> list[str]:
        self.thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome
