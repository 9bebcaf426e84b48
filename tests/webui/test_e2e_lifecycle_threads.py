"""The real WebUI while others reach into it: API threads during a job, Reload UI, the extension switched off and on.

Servers as for test_e2e_lifecycle.py. Reload UI needs both started with their UI (not --nowebui); with `probe_extension` copied
into the `extensions` folders of both, what lives in the process is counted as well.

What is expected: calls of other threads that ask for the device are put off to a safe point, so a job's pictures are those of
an undisturbed one, and what the host refuses it refuses with and without us. After a Reload UI there is one integration, one
mover, no hook twice, and no thread more.
"""

from __future__ import annotations

import os
import threading
import time
import urllib.error

import pytest

URL, STOCK_URL = os.environ.get("SD_WEBUI_URL", ""), os.environ.get("SD_WEBUI_STOCK_URL", "")

pytestmark = [
    pytest.mark.webui,
    pytest.mark.skipif(not (URL and STOCK_URL), reason="SD_WEBUI_URL and SD_WEBUI_STOCK_URL name no running WebUIs"),
]

if URL and STOCK_URL:
    from lifecycle_pair import JOB, Pair, check_idle, counted, outcome, own_threads
    from webui_client import Background

UNLOAD, RELOAD = ("/sdapi/v1/unload-checkpoint", {}), ("/sdapi/v1/reload-checkpoint", {})
LONG = 20


@pytest.fixture(scope="module")
def servers():
    return Pair(URL, STOCK_URL)


@pytest.fixture(autouse=True)
def pair(request):
    if not (URL and STOCK_URL):
        yield None
        return
    servers = request.getfixturevalue("servers")
    servers.as_found()
    servers.check("before")
    yield servers
    servers.as_found(budget_mb=0)


def probed(server):
    """What the probe extension counts, or None where it is not installed."""
    try:
        return server.get("/webui-probe")
    except urllib.error.HTTPError:
        return None


class Hammer:
    """Threads that post to one server until stopped; `refused` counts answers that were errors, `calls` all of them."""

    def __init__(self, server, posts):
        self.calls, self.refused, self._stop = 0, [], threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(server, each)) for each in posts]
        for thread in self._threads:
            thread.start()

    def _run(self, server, posts):
        while not self._stop.is_set():
            for path, body in posts:
                try:
                    server.post(path, body)
                except urllib.error.HTTPError as error:
                    with self._lock:
                        self.refused.append(f"{path}: {error.read().decode(errors='replace')[:200]}")
                with self._lock:
                    self.calls += 1

    def stop(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def undisturbed_but_for(pair, case, posts, job=None):
    """The same job on both servers while threads post to both; the same pictures, or the same failure; then an ordinary one."""
    job = {**JOB, "steps": LONG, **(job or {})}
    before = pair.ours.status()
    got, hammers = {}, {}
    for name, server in (("ours", pair.ours), ("stock", pair.stock)):
        running = threading.Thread(target=lambda name=name, server=server: got.__setitem__(name, outcome(server, job)))
        running.start()
        server.wait_for_step(1, running)
        hammers[name] = Hammer(server, posts)
        running.join()
        hammers[name].stop()
    told = ", ".join(f"{name} {hammer.calls} calls {len(hammer.refused)} refused" for name, hammer in hammers.items())
    print(f"\n{case}: ours {got['ours']}  stock {got['stock']}  {told}  {counted(before, pair.ours.status())}")
    assert got["ours"] == got["stock"]
    refused = {name: {each.partition(":")[0] for each in hammer.refused} for name, hammer in hammers.items()}
    assert refused["ours"] <= refused["stock"], hammers["ours"].refused[:3]
    assert all(hammer.calls >= 8 for hammer in hammers.values())
    check_idle(pair.ours.status())
    # The last reload may have come in the middle of nothing: this job may have to learn again, the next one may not.
    pair.check(f"{case}, the next job")
    pair.check(f"{case}, and one more", learning_passes=0, adopted=0, refetches=0, write_backs=0)


def test_unload_and_reload_by_one_thread(pair):
    undisturbed_but_for(pair, "unload and reload", [[UNLOAD, RELOAD]])


def test_unload_without_reload(pair):
    undisturbed_but_for(pair, "unload alone", [[UNLOAD]])


def test_hammered_by_eight_threads(pair):
    memory = ("/sdapi/v1/options", {"live_previews_enable": True})
    posts = [[UNLOAD], [UNLOAD], [RELOAD], [RELOAD], [UNLOAD, RELOAD], [RELOAD, UNLOAD], [memory], [memory, UNLOAD]]
    for number in range(2):
        undisturbed_but_for(pair, f"eight threads, job {number}", posts)


def test_hammered_during_a_hires_job_with_a_refiner(pair):
    """Models come and go on the sampling thread while others ask for the device."""
    if not (pair.same and pair.other):
        pytest.skip("the models folder has too few checkpoints")
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7, "hr_second_pass_steps": 6}
    job = {**hires, "steps": 10, "hr_checkpoint_name": pair.same[0], "refiner_checkpoint": pair.other[0], "refiner_switch_at": 0.5}
    undisturbed_but_for(pair, "hires, refiner, unload", [[UNLOAD]] * 4, job)


def test_our_settings_changed_by_others_during_a_job(pair):
    """Budget, lookahead and pinned memory from four threads; stock is left in peace."""
    job = {**JOB, "steps": LONG}
    quarter = pair.quarter()
    running = Background(pair.ours, "txt2img", job)
    pair.ours.wait_for_step(1, running.thread)
    changes = [("async_lowvram_budget_mb", quarter), ("async_lowvram_budget_mb", 2 * quarter), ("async_lowvram_lookahead_mb", 16)]
    changes += [("async_lowvram_lookahead_mb", 0), ("async_lowvram_pinned_mb", 64), ("async_lowvram_pinned_mb", 0)]
    posts = [("/sdapi/v1/options", {key: value}) for key, value in changes]
    hammer = Hammer(pair.ours, [posts, posts[::-1], posts[2:] + posts[:2], [UNLOAD]])
    running.thread.join()
    hammer.stop()
    got, wanted = running.result(), pair.stock.pictures("txt2img", job)
    print(f"\nour settings hammered: ours {got}  stock {wanted}  {hammer.calls} calls {hammer.refused[:2]}")
    assert got == wanted
    check_idle(pair.ours.status())
    pair.as_found()
    pair.check("after that")


def test_a_checkpoint_chosen_during_a_job(pair):
    """The host waits for the job with it; the next job has it."""
    if not pair.other:
        pytest.skip("the models folder has one architecture only")
    for title in (pair.other[0], pair.base):
        pictures = []
        for server in (pair.ours, pair.stock):
            running = Background(server, "txt2img", {**JOB, "steps": LONG})
            server.wait_for_step(1, running.thread)
            server.set_options(sd_model_checkpoint=title)  # answers when the job is over
            pictures.append(running.result())
        got, wanted = pictures
        print(f"\n{title} chosen during a job: ours {got}  stock {wanted}")
        assert got == wanted
        pair.check(f"{title}, the job after")


def test_switched_off_and_on_during_jobs(pair):
    """Ten times; what is chosen in the middle of a job counts from the next one on."""
    job = {**JOB, "steps": 6}
    wanted = pair.stock.pictures("txt2img", job)
    enabled, first = True, probed(pair.ours)
    for number in range(20):
        running = Background(pair.ours, "txt2img", job)
        pair.ours.wait_for_step(1, running.thread)
        pair.ours.set_options(async_lowvram_enabled=not enabled)
        during = pair.ours.status()
        got = running.result()
        print(f"\nswitched {'off' if enabled else 'on'} during job {number}: ours {got}  stock {wanted}  state {during['state']}")
        assert got == wanted
        status = pair.ours.status()
        if enabled:
            check_idle(status)
        else:
            assert (status["state"], status["networks"]) == ("standing_down", {})
            assert not status.get("pinned_bytes") and not status.get("allocated_bytes")
        enabled = not enabled
    assert enabled
    pair.check("on again")
    if first is not None:
        found = probed(pair.ours)
        assert found["ours"].get("AsyncModelMover") == first["ours"].get("AsyncModelMover") == 1
        assert own_threads(found) <= own_threads(first) + 1


# -- Reload UI -----------------------------------------------------------------------------------------------------------


def reload_ui(server, last_route):
    """Press the button in Settings, as the page does, and wait until the new UI answers. Asked seldom: a request that comes
    between two lines of the host's start (after its middleware is set up, before its API is) ends the host, ours or stock.
    `last_route`: of those registered at start, one of the last."""
    config = server.get("/config")
    button = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == "settings_restart_gradio")
    clicked = (button, [button, "click"])  # as gradio writes it, by version
    number = next(i for i, each in enumerate(config["dependencies"]) if any(target in clicked for target in each["targets"]))
    before = server.get("/app_id")
    server.post("/run/predict", {"fn_index": number, "data": [], "session_hash": "reload"})
    for _ in range(100):
        time.sleep(4)  # polling a server
        try:
            if server.get("/app_id") != before and server.get(last_route):
                return
        except (OSError, ValueError):
            pass  # it is down, or half up
    raise AssertionError("the UI did not come back")


def has_ui(server):
    try:
        return "components" in server.get("/config")
    except urllib.error.HTTPError:
        return False


@pytest.mark.parametrize("moment", ["idle", "in a job", "switched off"])
def test_reload_ui(pair, moment):
    if not (has_ui(pair.ours) and has_ui(pair.stock)):
        pytest.skip("the servers run without their UI")
    job = {**JOB, "steps": 60}
    firsts = {}
    for number in range(3):
        for server, route in ((pair.ours, "/async-lowvram/status"), (pair.stock, "/sdapi/v1/sd-models")):
            if moment == "in a job":
                running = threading.Thread(target=broken_off, args=(server, job))
                running.start()
                server.wait_for_step(2, running)
                reload_ui(server, route)
                running.join()
            else:
                if moment == "switched off" and server is pair.ours:
                    server.set_options(async_lowvram_enabled=False)
                    server.pictures("txt2img", JOB)
                    reload_ui(server, route)
                    assert server.status()["state"] == "standing_down"
                    server.set_options(async_lowvram_enabled=True)
                else:
                    reload_ui(server, route)
        case = f"Reload UI {moment}, {number}"
        pair.check(f"{case}, first job")
        grown = pair.check(f"{case}, second job", learning_passes=0)
        found, beside = probed(pair.ours), probed(pair.stock)
        if found is None or beside is None:
            continue
        print({key: found[key] for key in ("threads", "python_threads", "ours", "models")}, "stock", beside["threads"])
        assert found["ours"]["Integration"] == found["ours"]["AsyncModelMover"] == found["ours"]["HostMemory"] == 1
        assert found["hooked_twice"] == 0
        assert found["models"] == beside["models"]
        seen = {"ours": found["ours"], "hooks": found["hooks"], "passes": grown["passes"]}
        firsts.setdefault("seen", seen)
        assert seen == firsts["seen"]
        ahead = own_threads(found) - own_threads(beside)
        firsts.setdefault("ahead", ahead)
        assert ahead <= firsts["ahead"] + 1, "threads grow with every Reload UI"


def broken_off(server, job):
    """A job whose answer the Reload UI may cut off."""
    try:
        outcome(server, job)
    except (OSError, ValueError) as error:
        print(f"\nthe answer was cut off: {type(error).__name__}")
