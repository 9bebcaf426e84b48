"""Live previews in the real WebUI: the picture is the same with and without them, frames are sane, and cost the sampler nothing.

Needs the two servers of test_e2e.py; the one with the extension on the simulated device where there is no GPU. Run with `-s` to
see hashes, differences and shares of a step.
"""

from __future__ import annotations

import base64
import io
import threading
import time
import urllib.error
from typing import Any

import pytest
from pair_fixtures import STEPS, STOCK_URL, URL, needs_servers
from test_e2e import TXT2IMG, check_promises

pytestmark = needs_servers

if URL and STOCK_URL:
    import numpy as np
    from PIL import Image
    from webui_client import Background, Server

METHODS = ("Full", "Approx NN", "Approx cheap")  # TAESD's weights are not on every disk
JOB = {**TXT2IMG, "steps": 2 * STEPS}
OFF = {"live_previews_enable": False, "show_progress_every_n_steps": 10, "show_progress_type": "Approx NN", "show_progress_grid": True}
BACK = {"live_previews_enable": True, "show_progress_every_n_steps": 10, "show_progress_type": "Approx NN"}
POLLERS = 8
PERIOD_S = 0.02


class Pollers:
    """Clients that ask for progress all the time, half of them as the page does (`/internal/progress`, where there is one), the
    others as programs do. `frames`: what they were shown, each different one once; `after`: what those of the first kind got
    when the task was over."""

    def __init__(self, server: Server, task: str = "", count: int = POLLERS) -> None:
        self.frames: list[Any] = []
        self.ids: list[list[int]] = []
        self.pictures: set[str] = set()
        self.after: list[str] = []
        self.errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._task = task
        kinds = [self._as_page if task and number % 2 else self._as_program for number in range(count)]
        self._threads = [threading.Thread(target=self._poll, args=(kind, server)) for kind in kinds]

    def _poll(self, kind: Any, server: Server) -> None:
        try:
            kind(server)
        except BaseException as error:
            self.errors.append(error)

    def _as_program(self, server: Server) -> None:
        while not self._stop.wait(PERIOD_S):
            self._saw(server.get("/sdapi/v1/progress")["current_image"])

    def _as_page(self, server: Server) -> None:
        ids, last = [], -1
        self.ids.append(ids)
        while not self._stop.wait(PERIOD_S):
            told = server.post("/internal/progress", {"id_task": self._task, "id_live_preview": last, "live_preview": True})
            if told["live_preview"]:
                if told["active"]:
                    last = told["id_live_preview"]
                    ids.append(last)
                    self._saw(told["live_preview"].split(",", 1)[1])
                else:
                    self.after.append(told["live_preview"])

    def _saw(self, picture: str | None) -> None:
        if picture:
            with self._lock:
                if picture not in self.pictures:
                    self.pictures.add(picture)
                    self.frames.append(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"))

    def __enter__(self) -> Pollers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors
        assert not self.after
        for ids in self.ids:
            assert ids == sorted(set(ids)), "ids of frames grow"


def task_of(server: Server, name: str) -> str:
    """A task's id to be asked about, or "" where there is no page and thus nobody to ask (`--nowebui`)."""
    try:
        server.post("/internal/progress", {"id_task": "none", "live_preview": False})
    except urllib.error.HTTPError as error:
        assert error.code in (404, 405)
        return ""
    return f"task({name})"


def settled(server: Server) -> dict[str, Any]:
    """The status once every frame submitted has been decoded, skipped or given up: the last may be on its way when a job ends."""
    for _ in range(600):
        status = server.status()
        counts = status["preview"]
        if counts["decoded"] + counts["skipped"] + counts["errors"] == counts["submitted"]:
            return status
        time.sleep(0.05)  # polling a server, not synchronising: the answer decides
    raise AssertionError(f"frames without an end: {counts}")


@pytest.fixture(scope="module")
def ours():
    server = Server(URL)
    server.set_options(**OFF, live_preview_allow_lowvram_full=True)
    server.set_options(async_lowvram_enabled=True, async_lowvram_previews=True, async_lowvram_budget_mb=0)
    server.pictures("txt2img", JOB)
    quarter = max(48, server.status()["networks"]["unet"]["weight_bytes"] // 4 >> 20)
    server.set_options(async_lowvram_budget_mb=quarter)
    server.pictures("txt2img", JOB)
    yield server
    server.set_options(**BACK, live_preview_allow_lowvram_full=False, async_lowvram_budget_mb=0, async_lowvram_previews=True)


@pytest.fixture(scope="module")
def wanted(ours):
    """The stock server's pictures without previews, by batch."""
    stock = Server(STOCK_URL)
    stock.set_options(**OFF)
    yield {batch: stock.pictures("txt2img", {**JOB, "batch_size": batch, "n_iter": batch}) for batch in (1, 2)}
    stock.set_options(**BACK)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("every", [1, 3, -1])
@pytest.mark.parametrize("method", METHODS)
def test_the_picture_does_not_know_of_its_previews(ours, wanted, method, every, batch):
    ours.set_options(live_previews_enable=True, show_progress_every_n_steps=every, show_progress_type=method)
    before = settled(ours)
    task = task_of(ours, f"{method} {every} {batch}")
    with Pollers(ours, task) as pollers:
        got = ours.pictures("txt2img", {**JOB, "batch_size": batch, "n_iter": batch, "force_task_id": task or None})
    after = settled(ours)
    counts = {name: after["preview"][name] - before["preview"][name] for name in ("submitted", "decoded", "skipped", "errors")}
    print(f"\n{method}, every {every}, batch {batch}: ours {' '.join(got)}")
    print(f"  frames {counts}, seen {len(pollers.frames)}, ids {pollers.ids[:1]}")
    assert got == wanted[batch]
    assert counts["errors"] == 0
    assert counts["decoded"] + counts["skipped"] == counts["submitted"]
    due = batch if every == -1 else batch * len([step for step in range(2 * STEPS) if step % every == 0])
    assert 0 < counts["submitted"] <= due
    if every > 0:
        assert counts["decoded"] > 0
    check_promises(after, peak=False)


def test_the_last_frame_is_close_to_the_picture(ours):
    """Full: what is left is the last step's noise, and sizes agree. Others are coarse; their frame must not be flat."""
    for method in METHODS:
        ours.set_options(live_previews_enable=True, show_progress_every_n_steps=1, show_progress_type=method)
        with Pollers(ours, count=2) as pollers:
            final = ours.post("/sdapi/v1/txt2img", {**JOB, "steps": 12})["images"][0]
        picture = Image.open(io.BytesIO(base64.b64decode(final))).convert("RGB")
        assert pollers.frames, method
        frame = pollers.frames[-1]
        near = np.asarray(frame.resize(picture.size), dtype=float) - np.asarray(picture, dtype=float)
        first = np.asarray(pollers.frames[0].resize(picture.size), dtype=float) - np.asarray(picture, dtype=float)
        off, first_off = abs(near).mean(), abs(first).mean()
        print(f"\n{method}: frame {frame.size}, mean difference from the picture {off:.1f} levels, of the first {first_off:.1f}")
        assert np.asarray(frame).std() > 5
        if method == "Full":
            assert frame.size == picture.size
            assert abs(near).mean() < 20


def test_an_interrupt_with_previews_and_the_job_after_it(ours, wanted):
    ours.set_options(live_previews_enable=True, show_progress_every_n_steps=1, show_progress_type="Full")
    running = Background(ours, "txt2img", {**JOB, "steps": 40, "seed": 1})
    ours.wait_for_step(2, running.thread)
    ours.post("/sdapi/v1/interrupt", {})
    running.result()
    assert ours.pictures("txt2img", JOB) == wanted[1]
    running = Background(ours, "txt2img", {**JOB, "steps": 20, "seed": 2})
    ours.wait_for_step(2, running.thread)
    ours.post("/sdapi/v1/unload-checkpoint", {})
    ours.post("/sdapi/v1/reload-checkpoint", {})
    running.result()
    assert ours.pictures("txt2img", JOB) == wanted[1]
    check_promises(settled(ours), peak=False)


@pytest.mark.parametrize("method", METHODS)
def test_other_checkpoints_and_back(ours, wanted, method):
    """A frame of a model that is gone is neither decoded with the new one's weights nor in its way."""
    stock = Server(STOCK_URL)
    titles = {model["title"].split(" [")[0] for model in stock.get("/sdapi/v1/sd-models")}
    found = stock.get("/sdapi/v1/options")["sd_model_checkpoint"]
    ours.set_options(live_previews_enable=True, show_progress_every_n_steps=1, show_progress_type=method)
    try:
        for title in [*sorted(titles), found]:
            for server in (ours, stock):
                server.set_options(sd_model_checkpoint=title)
            with Pollers(ours, count=2) as pollers:
                got = ours.pictures("txt2img", JOB)
            expected = stock.pictures("txt2img", JOB)
            print(f"\n{method}, {title}: ours {' '.join(got)} stock {' '.join(expected)}, {len(pollers.frames)} frames seen")
            assert got == expected
            assert pollers.frames
        assert got == wanted[1]
    finally:
        for server in (ours, stock):
            server.set_options(sd_model_checkpoint=found)
    check_promises(settled(ours), peak=False)
    assert ours.status()["preview"]["errors"] == 0


def test_off_is_the_hosts_own(ours, wanted):
    ours.set_options(live_previews_enable=True, show_progress_every_n_steps=1, show_progress_type="Approx NN", async_lowvram_previews=False)
    before = settled(ours)["preview"]
    with Pollers(ours, count=2) as pollers:
        assert ours.pictures("txt2img", JOB) == wanted[1]
    assert ours.status()["preview"] == before
    assert pollers.frames
    ours.set_options(async_lowvram_previews=True)
    assert ours.pictures("txt2img", JOB) == wanted[1]
    assert ours.status()["preview"]["submitted"] > before["submitted"]


@pytest.mark.parametrize("method", METHODS)
def test_no_frame_of_one_job_in_the_next(ours, method):
    """The first job is cut short while frames of it are on their way; the second has another seed, so that no frame is alike."""
    ours.set_options(live_previews_enable=True, show_progress_every_n_steps=1, show_progress_type=method)
    shown = []
    for number in range(2):
        task = task_of(ours, f"{method}, job {number}")
        with Pollers(ours, task) as pollers:
            order = {**JOB, "seed": 100 + number, "prompt": f"picture {number}", "force_task_id": task or None}
            running = Background(ours, "txt2img", {**order, "steps": 40} if number == 0 else order)
            if number == 0:
                ours.wait_for_step(3, running.thread)
                ours.post("/sdapi/v1/interrupt", {})
            running.result()
        shown.append(pollers.pictures)
    print(f"\n{method}: {len(shown[0])} frames of a job cut short, {len(shown[1])} of the one after it")
    assert all(shown)
    assert not shown[0] & shown[1]
    at_the_end = ours.status()["preview"]["decoded"], ours.get("/sdapi/v1/progress")["current_image"]
    for _ in range(20):
        assert (ours.status()["preview"]["decoded"], ours.get("/sdapi/v1/progress")["current_image"]) == at_the_end


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(ours, wanted, kind):
    task = task_of(ours, kind)
    if not task:
        pytest.skip("no page, no formats: programs get PNG")
    ours.set_options(live_previews_enable=True, show_progress_every_n_steps=1, show_progress_type="Approx NN")
    ours.set_options(live_previews_image_format=kind)
    try:
        with Pollers(ours, task) as pollers:
            assert ours.pictures("txt2img", {**JOB, "force_task_id": task}) == wanted[1]
    finally:
        ours.set_options(live_previews_image_format="png")
    assert pollers.frames
    assert any(pollers.ids)


@pytest.mark.parametrize("method", METHODS)
def test_what_previews_cost_the_sampler(ours, method):
    """On the sampling thread, from one run: without previews, with the host's own inline, and submitted to the worker. Printed; the
    goal is 1% of a step. (No threshold: a machine under load would fail it.)"""
    ours.set_options(live_previews_enable=True, show_progress_every_n_steps=1, show_progress_type=method)
    job = {**JOB, "steps": 12}
    each = {}
    submit = {}
    for way in ("none", "inline", "worker") * 3:
        ours.set_options(live_previews_enable=way != "none", async_lowvram_previews=way != "inline")
        ours.pictures("txt2img", {**job, "steps": 1})
        before = settled(ours)["preview"]
        try:
            ours.get("/webui-sampler")
        except urllib.error.HTTPError:
            pytest.skip("the server has no probe_extension")
        ours.pictures("txt2img", job)
        took, after = ours.get("/webui-sampler"), settled(ours)["preview"]
        assert took["steps"] == 12
        each.setdefault(way, []).append((took["preview_seconds"] / 12, took["step_seconds"] / 12))
        submit[way] = (after["submit_seconds"] - before["submit_seconds"], after["submitted"] - before["submitted"])
    assert submit["worker"][1] > 0 == submit["none"][1] == submit["inline"][1]
    best = {way: min(times) for way, times in each.items()}
    nothing, step = best["none"]
    print(f"\n{method}: end of a step {nothing * 1e3:.2f} ms without previews; step {step * 1e3:.0f} ms")
    for way in ("inline", "worker"):
        more = best[way][0] - nothing
        print(f"  {way}: {more * 1e3:+.2f} ms per step, {100 * more / step:.2f}% of it")
    print(f"  submission alone: {submit['worker'][0] / submit['worker'][1] * 1e6:.0f} us per frame")
