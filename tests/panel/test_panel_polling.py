"""When the panel asks: once a second in sight and in a job, once at the ends, never when nobody can see it. Time is the test's."""

from __future__ import annotations

import threading

import pytest
from panel_examples import active, trial


def job(panel, runs):
    """The WebUI's progress bar comes or goes, and what the panel asks then is answered."""
    with panel.page.expect_event("requestfinished", lambda request: request.url.endswith("/status")):
        panel.job(runs)
    panel.settle()


def test_idle_asks_once(visit, answers):
    panel = visit(clock=True)
    assert answers.asked == ["status"]
    assert not panel.has_timer
    panel.pass_time(60_000)
    assert answers.asked == ["status"]


def test_once_a_second_in_a_job_and_once_at_its_end(visit, answers):
    panel = visit(clock=True)
    answers.status = active(generating=True)
    job(panel, True)
    assert answers.count("status") == 2
    panel.pass_time(5_000)
    assert answers.count("status") == 7
    answers.status = active(generating=False, pass_seconds=0.1)
    job(panel, False)
    assert answers.count("status") == 8
    assert panel.text("[data-figure=speed]") == "10.00 it/s"
    assert not panel.has_timer
    panel.pass_time(10_000)
    assert answers.count("status") == 8


def test_a_job_nobody_sees_in_the_page(visit, answers):
    """One of the API, found at the first look: followed until it ends."""
    answers.status = active(generating=True)
    panel = visit(clock=True)
    before = answers.count("status")
    panel.pass_time(3_000)
    assert answers.count("status") == before + 3
    answers.status = active(generating=False)
    panel.pass_time(5_000)
    assert answers.count("status") == before + 4
    assert not panel.has_timer


def test_a_trial_is_followed(visit, answers):
    answers.status = active(trial=trial("running", 0.3))
    panel = visit(clock=True)
    before = answers.count("status")
    panel.pass_time(3_000)
    assert answers.count("status") == before + 3


def test_never_when_the_page_is_hidden(visit, answers):
    answers.status = active(generating=True)
    panel = visit(clock=True)
    panel.open()
    panel.settle()
    panel.hide_page(True)
    asked = list(answers.asked)
    assert not panel.has_timer
    panel.pass_time(30_000)
    panel.job(True)
    panel.page.evaluate("() => window.asyncLowvram.client.refresh()")
    panel.pass_time(2_000)
    assert answers.asked == asked
    panel.hide_page(False)
    panel.wait_for_sight(True)
    assert answers.asked == [*asked, "status", "timeline"] or answers.asked == [*asked, "timeline", "status"]


def test_never_in_a_tab_that_is_not_shown(visit, answers):
    answers.status = active(generating=True)
    panel = visit(clock=True)
    panel.tab("Settings")
    panel.wait_for_sight(False)
    asked = list(answers.asked)
    panel.pass_time(10_000)
    assert answers.asked == asked and not panel.has_timer
    panel.tab("txt2img")
    panel.wait_for_sight(True)
    assert answers.asked == [*asked, "status"]


def test_never_when_scrolled_out_of_sight(visit, answers):
    answers.status = active(generating=True)
    panel = visit(clock=True, height=300)
    panel.page.evaluate("() => { document.body.style.paddingBottom = '3000px'; window.scrollTo(0, 2500); }")
    panel.wait_for_sight(False)
    asked = list(answers.asked)
    panel.pass_time(10_000)
    assert answers.asked == asked
    panel.page.locator("#async_lowvram").scroll_into_view_if_needed()
    panel.wait_for_sight(True)
    assert answers.asked == [*asked, "status"]


def test_requests_never_overlap(visit, answers):
    panel = visit(clock=True)
    answers.held = threading.Event()
    answers.status = active(generating=True)
    with panel.page.expect_event("request", lambda request: request.url.endswith("/status")):
        panel.job(True)
    panel.page.clock.run_for(5_000)
    panel.page.evaluate("() => { for (let i = 0; i < 5; i++) window.asyncLowvram.client.refresh(); }")
    assert panel.sent.count("status") == 2
    with panel.page.expect_event("requestfinished", lambda request: request.url.endswith("/status")):
        answers.held.set()  # the reason to ask is newer than what was asked: one more, at once
        panel.wait_until("() => window.asyncLowvram.client.model.status.generating")
    panel.settle()
    assert panel.sent.count("status") == answers.count("status") == 3


def test_what_is_on_its_way_is_given_up_when_nobody_looks(visit, answers):
    panel = visit(clock=True)
    answers.held = threading.Event()
    answers.status = active(pass_seconds=0.1)
    with panel.page.expect_event("request", lambda request: request.url.endswith("/status")):
        panel.page.evaluate("() => window.asyncLowvram.client.refresh()")
    with panel.page.expect_event("requestfailed", lambda request: request.url.endswith("/status")):
        panel.hide_page(True)
    answers.held.set()
    assert not panel.page.evaluate("() => window.asyncLowvram.client.asking")
    assert panel.text("[data-figure=speed]") == "2.43 it/s"


def test_a_server_that_does_not_answer(visit, answers):
    panel = visit(clock=True)
    answers.held = threading.Event()
    with panel.page.expect_event("request", lambda request: request.url.endswith("/status")):
        panel.page.evaluate("() => window.asyncLowvram.client.refresh()")
    panel.page.clock.run_for(19_000)
    assert panel.state == "active"
    panel.page.clock.run_for(1_000)
    panel.wait_until("() => document.querySelector('#async_lowvram').dataset.state === 'unreachable'")


def test_errors_back_off(visit, answers):
    """Asked again after 1, 2, 4 ... seconds, at most 30, and no further once there is an answer."""
    panel = visit(clock=True)
    answers.status = 500
    panel.refresh()
    asked, at = answers.count("status"), []
    for second in range(1, 100):
        panel.pass_time(1_000)
        if answers.count("status") > asked:
            asked = answers.count("status")
            at.append(second)
    assert at == [1, 3, 7, 15, 31, 61, 91]
    answers.status = active()
    panel.pass_time(30_000)
    assert panel.state == "active" and not panel.has_timer


@pytest.mark.parametrize("runs", [False, True])
def test_a_webui_without_the_extension_is_left_alone(visit, answers, runs):
    """Also in a job: 404 is an answer."""
    answers.status = 404
    panel = visit(clock=True)
    if runs:
        job(panel, True)
    asked = answers.count("status")
    panel.pass_time(30_000)
    assert answers.count("status") == asked and not panel.has_timer


def test_the_timeline_when_it_is_open(visit, answers):
    """Once when it is opened, then every five seconds in a job: asking makes the server time a pass."""
    panel = visit(clock=True)
    panel.pass_time(10_000)
    assert answers.count("timeline") == 0
    with panel.page.expect_event("requestfinished", lambda request: request.url.endswith("/timeline")):
        panel.open()
    panel.settle()
    panel.pass_time(20_000)
    assert answers.count("timeline") == 1
    answers.status = active(generating=True)
    job(panel, True)
    panel.pass_time(4_000)
    assert answers.count("timeline") == 1
    panel.pass_time(1_000)
    assert answers.count("timeline") == 2
    panel.pass_time(10_000)
    assert answers.count("timeline") == 4
    panel.page.click(".alv-toggle")
    panel.pass_time(20_000)
    assert answers.count("timeline") == 4
