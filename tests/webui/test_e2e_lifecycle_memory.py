"""What models that have gone leave behind in the real WebUI: nothing more than under stock.

Servers as for test_e2e_lifecycle.py, both with `probe_extension` copied into their `extensions` folders: it collects garbage
and has the allocator give back what it can before it counts, so that what is left is held by somebody.

What is expected: a model that was thrown away takes its masters, pinned bytes, networks and hooks along; the mover's threads
are as many as before; main memory grows by no more than stock's does.
"""

from __future__ import annotations

import os
import urllib.error

import pytest

URL, STOCK_URL = os.environ.get("SD_WEBUI_URL", ""), os.environ.get("SD_WEBUI_STOCK_URL", "")

pytestmark = [
    pytest.mark.webui,
    pytest.mark.skipif(not (URL and STOCK_URL), reason="SD_WEBUI_URL and SD_WEBUI_STOCK_URL name no running WebUIs"),
]

if URL and STOCK_URL:
    from lifecycle_pair import JOB, MIB, Pair, check_idle, own_threads

ROUNDS, SETTLED = 10, 3
NOISE = 48 << 20  # pages of the allocator that something small keeps; one model of the test's size is ten times that


@pytest.fixture(scope="module")
def servers():
    return Pair(URL, STOCK_URL)


@pytest.fixture(autouse=True)
def pair(request):
    if not (URL and STOCK_URL):
        yield None
        return
    servers = request.getfixturevalue("servers")
    for server in (servers.ours, servers.stock):
        try:
            server.get("/webui-probe")
        except urllib.error.HTTPError:
            pytest.skip("probe_extension is not installed in both servers")
    if not (servers.same and servers.other):
        pytest.skip("the models folder has too few checkpoints")
    servers.as_found()
    servers.check("before")
    yield servers
    servers.as_found(budget_mb=0)


def measured(pair):
    """(ours, stock, status), after everything that can be given back was."""
    return pair.ours.get("/webui-probe"), pair.stock.get("/webui-probe"), pair.ours.status()


def grow_no_more_than_stock(pair, case, one_round):
    """Ten rounds; what there is after the last is held against what there was after the third."""
    marks = []
    for number in range(ROUNDS):
        one_round(number)
        marks.append(measured(pair))
        ours, stock, status = marks[-1]
        figures = {key: f"{ours[key] / MIB:.0f} ({stock[key] / MIB:.0f}) MB" for key in ("VmRSS", "RssAnon")}
        figures |= {key: f"{status[key] / MIB:.1f} MB" for key in ("host_bytes", "pinned_bytes", "allocated_bytes")}
        figures |= {key: f"{ours[key]} ({stock[key]})" for key in ("threads", "models")}
        print(f"{case} {number}, ours (stock): {figures} {ours['ours']}")
        check_idle(status)
    (ours, stock, status), (last, beside, present) = marks[SETTLED - 1], marks[-1]
    assert present["host_bytes"] == status["host_bytes"]
    assert present["pinned_bytes"] == status["pinned_bytes"]
    assert last["ours"] == ours["ours"]
    assert last["hooks"] == ours["hooks"] and last["hooked_twice"] == 0
    assert last["models"] == beside["models"]
    assert last["python_threads"].get("async") == ours["python_threads"].get("async")
    assert own_threads(last) - own_threads(beside) <= own_threads(ours) - own_threads(stock) + 1
    tensors = sum(last["living"].values()) - sum(ours["living"].values())
    beside_tensors = sum(beside["living"].values()) - sum(stock["living"].values())
    assert tensors <= beside_tensors + 16, (tensors, beside_tensors)
    for kind in ("VmRSS", "RssAnon"):
        grown, wanted = last[kind] - ours[kind], beside[kind] - stock[kind]
        print(f"{case}: {kind} grew by {grown / MIB:.1f} MB, stock's by {wanted / MIB:.1f} MB")
        assert grown <= max(wanted, 0) + NOISE, (kind, grown, wanted)


def test_ten_switches_in_place(pair):
    def one_round(number):
        for title in (pair.same[0], pair.base):
            pair.both(sd_model_checkpoint=title)
            pair.check(f"in place {number}: {title}")

    grow_no_more_than_stock(pair, "switches in place", one_round)


def test_ten_switches_across_architectures(pair):
    def one_round(number):
        for title in (pair.other[0], pair.base):
            pair.both(sd_model_checkpoint=title)
            pair.check(f"across {number}: {title}")

    grow_no_more_than_stock(pair, "switches across", one_round)


@pytest.mark.parametrize("limit", [1, 2])
def test_ten_refiner_jobs(pair, limit):
    job = {**JOB, "steps": 8, "refiner_checkpoint": pair.other[0], "refiner_switch_at": 0.5}
    pair.both(sd_checkpoints_limit=limit)
    grow_no_more_than_stock(pair, f"refiner, limit {limit}", lambda number: pair.check(f"refiner job {number}, limit {limit}", job))


def test_everything_is_given_back_when_switched_off(pair):
    """Masters, pinned bytes, threads and the mover itself; the weights are the host's own again."""
    before = measured(pair)[0]
    for number in range(SETTLED):
        pair.ours.set_options(async_lowvram_enabled=False)
        pair.pictures(JOB)
        off = pair.ours.get("/webui-probe")
        status = pair.ours.status()
        assert not status.get("pinned_bytes") and not status.get("allocated_bytes")
        assert {kind: count for kind, count in off["ours"].items() if kind != "Integration"} == {}, off["ours"]
        assert not any(name.startswith("lib_async_lowvram") for name in off["hooks"]), off["hooks"]
        assert not off["python_threads"].get("async")
        pair.ours.set_options(async_lowvram_enabled=True)
        pair.check(f"on again {number}")
        again = measured(pair)[0]
        for name, found in (("off", off), ("on again", again)):
            print(f"{name}: {found['VmRSS'] / MIB:.0f} MB, {found['threads']} threads")
    assert again["ours"] == before["ours"]
    assert again["hooked_twice"] == 0
    assert again["VmRSS"] <= before["VmRSS"] + NOISE
