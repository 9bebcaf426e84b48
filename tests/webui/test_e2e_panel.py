"""The panel's server side in the real WebUI: status and timeline as the schemas say, a trial in the queue, the switch in an X/Y/Z plot.

Needs SD_WEBUI_URL (ours) and SD_WEBUI_STOCK_URL, as `test_e2e`.
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request

import pytest
from test_panel import validated
from webui_client import Background, Server

URL, STOCK = os.environ.get("SD_WEBUI_URL"), os.environ.get("SD_WEBUI_STOCK_URL")
NO_SERVERS = "SD_WEBUI_URL and SD_WEBUI_STOCK_URL name no running WebUIs"
pytestmark = [pytest.mark.webui, pytest.mark.skipif(not URL or not STOCK, reason=NO_SERVERS)]

JOB = {"prompt": "a cat, (gold:1.3)", "steps": 6, "width": 192, "height": 192, "seed": 7, "sampler_name": "Euler a", "cfg_scale": 7}
OURS = {"X-Async-Lowvram": "1"}
PLOT = "x/y/z plot"


@pytest.fixture(scope="module")
def ours():
    server = Server(URL)
    server.set_options(async_lowvram_enabled=True, async_lowvram_budget_mb=0, async_lowvram_lookahead_mb=0)
    server.pictures("txt2img", JOB)
    return server


@pytest.fixture(scope="module")
def stock():
    return Server(STOCK)


def trial(server: Server, method: str, headers=OURS) -> tuple[int, dict]:
    request = urllib.request.Request(server.url + "/async-lowvram/trial", method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def over(server: Server) -> dict:
    """The trial's status once it has ended."""
    while (status := server.status()["trial"])["state"] in ("waiting", "running"):
        time.sleep(0.05)  # polling a server: the answer decides
    return status


def test_status_and_timeline(ours):
    status = validated(ours.status(), "status")
    assert status["state"] == "active" and not status["generating"]
    vram = status["vram"]
    assert vram["total"] == sum(vram[part] or 0 for part in ("resident", "ring", "activations", "others", "free"))
    assert any("budget for weights" in message["text"] for message in status["messages"])
    ours.set_options(async_lowvram_budget_mb=16)  # else all of it stays on the device, and there are no copies to see
    ours.pictures("txt2img", JOB)
    ours.get("/async-lowvram/timeline")  # asks for one
    running = Background(ours, "txt2img", JOB)
    ours.wait_for_step(2, running.thread)
    assert validated(ours.status(), "status")["generating"]
    running.result()
    timeline = validated(ours.get("/async-lowvram/timeline"), "timeline")
    assert timeline["network"] == "unet" and {"copy", "compute"} <= {span["lane"] for span in timeline["spans"]}
    assert any(span["name"].startswith("input_blocks.") for span in timeline["spans"])
    ours.set_options(async_lowvram_budget_mb=0)


def test_a_trial(ours):
    before = ours.pictures("txt2img", JOB)
    assert trial(ours, "POST", {}) == (403, {"started": False, "reason": "only the extension's own panel may ask for this"})
    assert trial(ours, "POST") == (200, {"started": True, "reason": ""})
    assert trial(ours, "POST") == (200, {"started": False, "reason": "a trial is under way already"})
    ended = over(ours)
    print(f"\n{ended}")
    assert ended["state"] == "done", ended["reason"]
    result = ended["result"]
    assert result["equal"] and result["shape"] == "192x192, batch 1"
    assert result["stock_seconds"] > 0 and result["async_seconds"] > 0
    status = validated(ours.status(), "status")
    assert status["stock_pass_seconds"] == result["stock_seconds"]
    assert status["state"] == "active" and not status["generating"]
    assert ours.pictures("txt2img", JOB) == before  # as if nothing had been


def test_a_trial_waits_in_the_queue(ours):
    running = Background(ours, "txt2img", {**JOB, "steps": 30})
    ours.wait_for_step(2, running.thread)
    assert trial(ours, "POST")[1]["started"]
    assert ours.status()["trial"]["state"] == "waiting"
    assert trial(ours, "DELETE")[0] == 200
    running.result()
    assert over(ours)["reason"] == "stopped"


def test_a_trial_is_stopped_in_the_middle(ours):
    before = ours.pictures("txt2img", JOB)
    assert trial(ours, "POST")[1]["started"]
    while ours.status()["trial"]["state"] == "waiting":
        time.sleep(0.02)
    trial(ours, "DELETE")
    assert over(ours) | {"progress": 0} == {"state": "failed", "progress": 0, "reason": "stopped", "result": None}
    assert ours.status()["state"] in ("active", "learning")  # on again, perhaps with everything to be learned
    assert ours.pictures("txt2img", JOB) == before
    assert ours.status()["state"] == "active"


def test_pictures_asked_for_during_a_trial_wait(ours, stock):
    assert trial(ours, "POST")[1]["started"]
    found: list = []
    asking = threading.Thread(target=lambda: found.append(ours.pictures("txt2img", JOB)))
    asking.start()
    asking.join()
    assert over(ours)["state"] == "done"
    assert found == [stock.pictures("txt2img", JOB)]


def plot(server: Server, axis: str, values: str) -> list[str]:
    """The pictures of an X plot over `axis`, the grid first."""
    script = server.get("/sdapi/v1/script-info")
    info = next(each for each in script if each["name"] == PLOT and not each["is_img2img"])
    labels = [argument["label"] for argument in info["args"]]
    choices = info["args"][labels.index("X type")]["choices"]
    arguments = [argument["value"] for argument in info["args"]]
    arguments[labels.index("X type")] = choices.index(axis)
    arguments[labels.index("X values")] = values
    for label in ("Y type", "Z type"):
        arguments[labels.index(label)] = 0
    for label in ("Include Sub Images", "Use text inputs instead of dropdowns"):
        arguments[labels.index(label)] = True
    return server.pictures("txt2img", {**JOB, "script_name": PLOT, "script_args": arguments})


def test_the_axes_of_the_plot(ours, stock):
    expected = stock.pictures("txt2img", JOB)[0]
    for axis, values in (("enabled", "True, False, True"), ("budget (MB)", "0, 16, 64"), ("lookahead (MB)", "0, 8")):
        before = ours.status()["streamed_bytes"]
        made = plot(ours, f"[Async LowVRAM] {axis}", values)
        assert set(made[1 : 1 + len(values.split(","))]) == {expected}, axis
        assert ours.status()["streamed_bytes"] > before or axis == "enabled"  # a mover that was switched off took its counts along
    assert ours.status()["state"] == "active"
    assert ours.pictures("txt2img", JOB)[0] == expected
