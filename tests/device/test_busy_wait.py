"""Waiting awake ends when waiting asleep would have, and not before."""

from __future__ import annotations

import threading
import time

from lib_async_lowvram.device import busy_wait
from lib_async_lowvram.device.busy_wait import BusyWait


def test_it_lasts_until_the_time_and_not_less():
    wait = BusyWait()
    for seconds in (0.0, 1e-4, 2 * busy_wait.ASLEEP_SECONDS):
        end = time.perf_counter() + seconds
        wait.until(end)
        assert time.perf_counter() >= end
    wait.until(0.0)  # long ago


def test_only_the_last_of_a_known_time_is_spent_awake(monkeypatch):
    slept = []
    monkeypatch.setattr(busy_wait.time, "sleep", slept.append)
    now = iter([10.0, 10.5, 13.0])
    monkeypatch.setattr(busy_wait.time, "perf_counter", lambda: next(now))
    BusyWait().until(12.0)
    assert slept == [2.0 - busy_wait.ASLEEP_SECONDS]


def test_other_threads_run_meanwhile():
    reached = threading.Event()
    waiting = threading.Event()

    def reach():
        waiting.wait()
        reached.set()

    thread = threading.Thread(target=reach)
    thread.start()
    looks = []

    def look():
        looks.append(reached.is_set())
        waiting.set()
        return looks[-1]

    BusyWait().until_true(look)
    thread.join()
    assert looks[0] is False and looks[-1] is True and looks.count(True) == 1
