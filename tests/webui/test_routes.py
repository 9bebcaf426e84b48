"""The routes: two only read, one costs the device ten seconds and asks who wants it."""

from __future__ import annotations

import json

import pytest

from lib_async_lowvram.webui import memory_report, routes

fastapi = pytest.importorskip("fastapi", reason="the WebUI's own web framework is not installed here")
pytest.importorskip("httpx", reason="fastapi's test client needs it")

OURS = {routes.HEADER: "1"}


class Asked:
    """Answers, and writes down what was asked."""

    def __init__(self, **status) -> None:
        self.told = {"state": "active", **status}
        self.asked: list[str] = []

    def status(self):
        self.asked.append("status")
        return self.told

    def timeline(self):
        self.asked.append("timeline")
        return {"network": "unet", "seconds": float("nan"), "spans": [{"lane": "copy", "name": "a", "start": 0.0, "end": 1.0, "bytes": 3}]}

    def start_trial(self):
        self.asked.append("start")
        return True, ""

    def stop_trial(self):
        self.asked.append("stop")


@pytest.fixture
def served():
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    return app, TestClient(app)


def test_status_and_timeline(served):
    app, client = served
    routes.add_routes(app, Asked(messages=[{"at": 1.0, "level": "warning", "text": "cannot read /home/anna/x.ckpt", "count": 1}]))
    status = client.get("/async-lowvram/status").json()
    assert status["state"] == "active" and "networks" in status and status["messages"][0]["text"] == "cannot read <path>"
    timeline = client.get("/async-lowvram/timeline").json()
    assert (timeline["schema"], timeline["network"], timeline["seconds"], len(timeline["spans"])) == (1, "unet", None, 1)


def test_added_again_it_asks_the_newer(served):
    app, client = served
    for state in ("learning", "active"):
        routes.add_routes(app, Asked(state=state))
    assert client.get(routes.STATUS).json()["state"] == "active"
    assert len([route for route in app.routes if route.path.startswith(routes.ROOT)]) == 4


def test_a_failing_status_is_an_answer(served, caplog):
    app, client = served
    asked = Asked()

    def broken():
        raise RuntimeError("no /tmp/x here")

    asked.status = asked.timeline = broken
    routes.add_routes(app, asked)
    answer = client.get(routes.STATUS).json()
    assert answer["state"] == "demoted"
    assert answer["last_error"] == "RuntimeError"  # its text may hold anything, a path or a prompt; the log has it
    assert client.get(routes.TIMELINE).json()["spans"] == []
    assert "no /tmp/x here" in caplog.text


@pytest.mark.parametrize("path", [routes.STATUS, routes.TIMELINE])
@pytest.mark.parametrize("method", ["post", "put", "patch", "delete"])
def test_these_only_read(served, method, path):
    app, client = served
    asked = Asked()
    routes.add_routes(app, asked)
    assert getattr(client, method)(path, headers=OURS).status_code == 405
    assert not asked.asked


def test_they_take_no_input(served, monkeypatch):
    monkeypatch.setattr(memory_report, "process", dict)  # which grows from one answer to the next
    app, client = served
    routes.add_routes(app, Asked())
    plain = client.get(routes.STATUS).json()
    assert client.get(routes.STATUS, params={"state": "demoted", "path": "/etc/passwd"}).json() == plain
    assert client.request("GET", routes.STATUS, json={"state": "demoted"}).json() == plain
    for route in app.routes:
        if route.path.startswith(routes.ROOT):
            assert not (route.dependant.query_params or route.dependant.path_params or route.dependant.body_params)


def test_the_trial_needs_the_panels_header(served):
    app, client = served
    asked = Asked()
    routes.add_routes(app, asked)
    assert client.post(routes.TRIAL).status_code == client.delete(routes.TRIAL).status_code == 403
    assert client.post(routes.TRIAL, headers={routes.HEADER: "0"}).json() == {
        "started": False, "reason": "only the extension's own panel may ask for this"
    }  # fmt: skip
    assert not asked.asked
    assert client.post(routes.TRIAL, headers=OURS).json() == {"started": True, "reason": ""}
    assert client.delete(routes.TRIAL, headers=OURS).json() == {"reason": ""}
    assert asked.asked == ["start", "stop"]
    assert client.get(routes.TRIAL).status_code == 405


def test_the_trial_needs_the_login_where_there_is_one(served):
    from fastapi.testclient import TestClient

    app, client = served
    app.auth, app.tokens = {"anna": "secret"}, {"a-token": "anna"}
    asked = Asked()
    routes.add_routes(app, asked)
    assert client.post(routes.TRIAL, headers=OURS).json() == {"started": False, "reason": "log in first"}
    assert TestClient(app, cookies={"access-token": "guessed"}).post(routes.TRIAL, headers=OURS).status_code == 403
    assert not asked.asked
    for cookie in routes.COOKIES:
        assert TestClient(app, cookies={cookie: "a-token"}).post(routes.TRIAL, headers=OURS).json()["started"]
    assert client.get(routes.STATUS).status_code == 200  # only reads


def test_json_without_surprises(served):
    app, client = served
    routes.add_routes(app, Asked(efficiency=float("inf"), networks={1: {"passes": {2}}}))
    json.loads(client.get(routes.STATUS).text, parse_constant=lambda name: pytest.fail(name))
