""" "Try it": started with the header that other sites cannot send, followed, stopped, its result and its failure."""

from __future__ import annotations

import pytest
from panel_examples import RESULT, active, trial


@pytest.fixture
def panel(visit):
    made = visit(clock=True)
    made.open()
    made.settle()
    return made


def press(panel, which):
    with panel.page.expect_event("requestfinished", lambda request: request.url.endswith("/trial")):
        panel.page.click(f"#async_lowvram [data-do={which}]")
    panel.settle()


def test_from_the_press_to_the_table(panel, answers):
    answers.status = active(trial=trial("waiting"))
    press(panel, "try")
    assert answers.headers == ["1"]
    panel.wait_for_text(".alv-trial-state", "Waiting for the queue")
    assert panel.shown("[data-do=stop]") and not panel.shown("[data-do=try]")
    answers.status = active(trial=trial("running", 0.42), generating=True)
    panel.pass_time(1_000)
    bar = panel.page.locator("#async_lowvram .alv-progress")
    assert (bar.get_attribute("role"), bar.get_attribute("aria-valuenow"), bar.get_attribute("aria-label")) == (
        "progressbar",
        "42",
        "Trial",
    )
    assert panel.text(".alv-trial-state") == "Measuring"
    assert bar.locator("span").evaluate("(fill) => fill.style.width") == "42%"
    answers.status = active(trial=trial("done", 1.0, "", RESULT))
    panel.pass_time(1_000)
    assert panel.texts(".alv-result tbody tr") == ["Stock 980 ms 1.02 it/s", "Async 412 ms 2.43 it/s", "Limit 391 ms 2.56 it/s"]
    assert panel.text(".alv-result caption") == "512x512, batch 2 · 6 passes"
    assert panel.text(".alv-verdict") == "2.38 times as fast as stock · same bits: yes"
    assert not panel.shown(".alv-progress") and panel.shown("[data-do=try]") and not panel.has_timer


def test_in_the_turns_of_stock(panel, answers):
    """The extension stands down for them: the panel stays open, and its progress bar in sight."""
    answers.status = active(trial=trial("running", 0.4), state="standing_down", reason="a trial measures stock's moves", generating=True)
    panel.refresh()
    assert (panel.state, panel.text(".alv-state")) == ("trial", "Trial: stock and async moving in turn")
    assert panel.shown(".alv-progress") and panel.shown("[data-do=stop]") and not panel.shown("[data-figure=speed]")
    answers.status = active(trial=trial("done", 1.0, "", RESULT))
    panel.pass_time(1_000)
    assert panel.state == "active" and panel.shown(".alv-result")


def test_other_bits_and_no_limit(panel, answers):
    answers.status = active(trial=trial("done", 1.0, "", {**RESULT, "equal": False, "limit_seconds": None}))
    panel.refresh()
    assert panel.text(".alv-verdict").endswith("same bits: no")
    assert panel.texts(".alv-result tbody tr")[2] == "Limit – –"


def test_stopped(panel, answers):
    answers.status = active(trial=trial("running", 0.1))
    press(panel, "try")
    panel.wait_for_text(".alv-trial-state", "Measuring")
    assert panel.page.evaluate("() => document.activeElement.dataset.do") == "stop"
    answers.status = active(trial=trial("failed", 0.1, "stopped"))
    press(panel, "stop")
    panel.wait_for_text(".alv-trial-state", "The trial was stopped")
    assert answers.headers == ["1", "1"] and answers.count("stop") == 1
    assert panel.page.evaluate("() => document.activeElement.dataset.do") == "try"


def test_failed(panel, answers):
    answers.status = active(trial=trial("failed", 0.5, "the model was switched"))
    panel.refresh()
    assert panel.text(".alv-trial-state") == "The trial failed: the model was switched"
    assert panel.shown("[data-do=try]") and not panel.shown(".alv-result")


def test_not_started(panel, answers):
    answers.start = (False, "no model is loaded")
    press(panel, "try")
    panel.wait_for_text(".alv-trial-state", "The trial was not started: no model is loaded")


def test_refused_and_unreachable(panel, answers):
    panel.page.route("**/async-lowvram/trial", lambda route: route.fulfill(status=403, body="forbidden"))
    press(panel, "try")
    panel.wait_for_text(".alv-trial-state", "The trial was not started: HTTP 403")
    panel.page.unroute("**/async-lowvram/trial")
    panel.page.route("**/async-lowvram/trial", lambda route: route.abort())
    panel.page.click("#async_lowvram [data-do=try]")
    panel.wait_for_text(".alv-trial-state", "The trial was not started: No answer from the WebUI")


def test_a_result_stays_as_it_was_drawn(panel, answers):
    """So that it can be selected while figures go on."""
    answers.status = active(trial=trial("done", 1.0, "", RESULT))
    panel.refresh()
    panel.page.evaluate("() => { window.row = document.querySelector('#async_lowvram [data-row=async]'); }")
    answers.status = active(trial=trial("done", 1.0, "", RESULT), pass_seconds=0.5)
    panel.refresh()
    assert panel.page.evaluate("() => window.row.isConnected")
