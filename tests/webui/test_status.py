"""The status route: always the same keys, always JSON, never a path."""

from __future__ import annotations

import json
import math

import pytest

from lib_async_lowvram.webui import memory_report, status

KEYS = """version state reason device budget_bytes resident_bytes ring_bytes pinned_bytes pinned_limit_bytes passes hits misses refetches
write_backs adopted streamed_bytes_per_pass bandwidth_bytes_per_s pass_seconds stall_seconds limit_seconds best_schedule_seconds efficiency
schedule_efficiency bound preview last_error""".split()


def test_every_key_even_when_nothing_is_known():
    answer = status.complete({})
    assert set(KEYS) <= set(answer)
    assert set(answer["preview"]) == {"decoded", "skipped", "decode_seconds", "errors", "peak_weight_bytes"}
    json.dumps(answer, allow_nan=False)


def test_what_is_known_wins_and_more_is_passed_on():
    answer = status.complete({"state": "active", "hits": 3, "networks": {"unet": {"passes": 2}}})
    assert (answer["state"], answer["hits"], answer["networks"]) == ("active", 3, {"unet": {"passes": 2}})


def test_nothing_json_cannot_hold():
    answer = status.complete({"efficiency": math.nan, "networks": {1: {"passes": (math.inf, {2}, object)}}})
    assert answer["efficiency"] is None
    json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize(
    "message",
    [
        "FileNotFoundError: '/home/anna/models/secret.safetensors' is missing",
        r"OSError: C:\Users\Anna\models\secret.safetensors",
        "/home/anna/secret.ckpt",
        "cannot open (/srv/secret.ckpt)",
    ],
)
def test_no_paths(message):
    answer = status.complete({"last_error": message})
    assert "secret" not in answer["last_error"]
    assert "<path>" in answer["last_error"]


def test_plain_text_stays():
    text = "half of 1/2 GB at 3 MB/s; and/or nothing"
    assert status.complete({"reason": text})["reason"] == text


@pytest.fixture
def served():
    fastapi = pytest.importorskip("fastapi", reason="the WebUI's own web framework is not installed here")
    pytest.importorskip("httpx", reason="fastapi's test client needs it")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    return app, TestClient(app)


def test_the_route(served):
    app, client = served
    status.add_route(app, lambda: {"state": "learning"})
    answer = client.get(status.PATH)
    assert answer.status_code == 200
    assert answer.json()["state"] == "learning"
    assert set(KEYS) <= set(answer.json())


def test_added_again_it_asks_the_newer(served):
    app, client = served
    status.add_route(app, lambda: {"state": "learning"})
    status.add_route(app, lambda: {"state": "active"})
    assert client.get(status.PATH).json()["state"] == "active"
    assert [getattr(route, "path", None) for route in app.routes].count(status.PATH) == 1


def test_a_failing_status_is_an_answer(served):
    app, client = served

    def broken():
        raise RuntimeError("no /tmp/x here")

    status.add_route(app, broken)
    answer = client.get(status.PATH).json()
    assert answer["state"] == "demoted"
    assert answer["last_error"] == "RuntimeError"  # its text may hold anything, a path or a prompt; the log has it


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete"])
def test_the_route_only_reads(served, method):
    app, client = served
    asked = []
    status.add_route(app, lambda: asked.append(1) or {"state": "active"})
    assert getattr(client, method)(status.PATH).status_code == 405
    assert not asked


def test_the_route_takes_no_input(served, monkeypatch):
    monkeypatch.setattr(memory_report, "process", dict)  # which grows from one answer to the next
    app, client = served
    status.add_route(app, lambda: {"state": "active"})
    plain = client.get(status.PATH).json()
    assert client.get(status.PATH, params={"state": "demoted", "path": "/etc/passwd"}).json() == plain
    assert client.request("GET", status.PATH, json={"state": "demoted"}).json() == plain
    (route,) = [route for route in app.routes if getattr(route, "path", None) == status.PATH]
    assert not (route.dependant.query_params or route.dependant.path_params or route.dependant.body_params)
