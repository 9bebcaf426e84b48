"""Waiting awake ends when waiting asleep would have, and not before."""

from __future__ import annotations

import threading
import time

from lib_async_lowvram.device import busy_wait
from lib_async_lowvram.device.busy_wait import BusyWait


def test_it_lasts_until_the_time_and_not_less():
    wait = BusyWait()
    for seconds in (0.0, 1e-4, 2 * busy_wait.AWAKE_SECONDS):
        end = time.perf_counter() + seconds
        wait.until(end)
        assert time.perf_counter() >= end
    wait.until(0.0)  # long ago


def test_only_the_last_of_a_known_time_is_spent_awake(monkeypatch):
    slept = []
    monkeypatch.setattr(busy_wait.time, "sleep", slept.append)
    now = iter([10.0, 12.5])
    monkeypatch.setattr(busy_wait.time, "perf_counter", lambda: next(now))
    BusyWait().until(12.0)
    assert slept == [2.0 - busy_wait.AWAKE_SECONDS]


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


def test_it_computes_through_what_is_left_in_few_calls(monkeypatch):
    """Each call asks for the interpreter's lock when it comes back."""
    clock, computed = [0.0], []

    def hashed(name, password, salt, iterations):
        computed.append(iterations)
        clock[0] += iterations / 2e6

    monkeypatch.setattr(busy_wait.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(busy_wait.hashlib, "pbkdf2_hmac", hashed)
    wait = BusyWait()
    wait.until(busy_wait.AWAKE_SECONDS / 2)
    assert clock[0] >= busy_wait.AWAKE_SECONDS / 2 and len(computed) < 20
    computed.clear()
    wait.until(clock[0] + busy_wait.AWAKE_SECONDS)  # it knows by now how fast this processor is
    assert len(computed) < 12 and sum(computed) / 2e6 < 1.01 * busy_wait.AWAKE_SECONDS
