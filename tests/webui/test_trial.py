"""The trial: order, figures, equality; and that the switch is back and the queue free whatever happens."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest

from lib_async_lowvram.webui.trial import LEAST, MOST, WARM, Made, Stopped, Trial


class HeldThread:
    """Runs when the test says so."""

    waiting: list[HeldThread] = []

    def __init__(self, target, name, daemon) -> None:
        assert daemon
        self._target = target

    def start(self) -> None:
        HeldThread.waiting.append(self)

    @classmethod
    def run_all(cls) -> None:
        while cls.waiting:
            cls.waiting.pop(0)._target()


class Booth:
    """A host's pictures: stock takes 0.4 s a step, ours 0.1."""

    def __init__(self, seconds=None, pixels=None) -> None:
        self.seconds = seconds or {True: 0.1, False: 0.4}
        self.pixels = pixels or {True: b"same", False: b"same"}
        self.log: list = []
        self.lock = threading.Lock()
        self.why_not = ""
        self.raises: dict[int, Exception] = {}
        self.during = lambda: None

    @contextmanager
    def queue(self):
        with self.lock:
            yield

    def refusal(self) -> str:
        return self.why_not

    def make(self, asynchronous: bool, steps: int) -> Made:
        assert self.lock.locked()
        self.log.append((asynchronous, steps))
        self.during()
        error = self.raises.get(len(self.log))
        if error is not None:
            raise error
        second = self.seconds[asynchronous]
        slow = [5 * second] * WARM if steps > WARM + 1 else [5 * second]
        return Made([*slow, *[second] * (steps - 1 - len(slow))], self.pixels[asynchronous])

    def interrupt(self) -> None:
        self.log.append("interrupt")

    def restore(self) -> None:
        assert self.lock.locked()
        self.log.append("restore")

    def describe(self) -> str:
        return "512x512, batch 1"

    def limit_seconds(self):
        return 0.045


@pytest.fixture(autouse=True)
def none_waiting():
    HeldThread.waiting.clear()


def trial_of(booth: Booth) -> Trial:
    return Trial(booth, HeldThread)


def test_a_trial() -> None:
    booth = Booth()
    trial = trial_of(booth)
    assert trial.status() == {"state": "idle", "progress": 0.0, "reason": "", "result": None}
    assert trial.start() == (True, "")
    assert trial.status()["state"] == "waiting"
    HeldThread.run_all()
    seen = trial.status()
    assert (seen["state"], seen["progress"], seen["reason"]) == ("done", 1.0, "")
    steps = 1 + WARM + 7  # three seconds of stock's steps
    assert booth.log == [(False, WARM + 1), (True, steps), (False, steps), (True, steps), "restore"]
    assert seen["result"] == {
        "passes": 21, "shape": "512x512, batch 1", "stock_seconds": 0.4, "async_seconds": 0.1, "limit_seconds": 0.045,
        "ratio": pytest.approx(4.0), "equal": True,
    }  # fmt: skip
    assert trial.stock_pass_seconds == 0.4
    assert not booth.lock.locked()


@pytest.mark.parametrize("second, counted", [(1e-9, MOST), (0.0, MOST), (60.0, LEAST)])
def test_steps_are_bounded(second, counted) -> None:
    booth = Booth({True: second, False: second})
    trial = trial_of(booth)
    trial.start()
    HeldThread.run_all()
    assert booth.log[1] == (True, 1 + WARM + counted)
    assert trial.status()["state"] == "done"


def test_other_bits_are_told() -> None:
    booth = Booth(pixels={True: b"ours", False: b"stock"})
    trial = trial_of(booth)
    trial.start()
    HeldThread.run_all()
    assert trial.status()["result"]["equal"] is False


def test_refused() -> None:
    booth = Booth()
    booth.why_not = "no model is loaded"
    trial = trial_of(booth)
    assert trial.start() == (False, "no model is loaded")
    assert not HeldThread.waiting and trial.status()["state"] == "idle"


def test_one_at_a_time() -> None:
    trial = trial_of(Booth())
    trial.start()
    assert trial.start() == (False, "a trial is under way already")
    HeldThread.run_all()
    assert trial.start()[0]


def test_stopped_while_it_waits() -> None:
    booth = Booth()
    trial = trial_of(booth)
    trial.start()
    trial.stop()
    HeldThread.run_all()
    assert booth.log == []  # nothing was switched
    assert (trial.status()["state"], trial.status()["reason"]) == ("failed", "stopped")


def test_stopped_in_a_picture() -> None:
    booth = Booth()
    trial = trial_of(booth)

    def stop():
        trial.stop()
        booth.raises[len(booth.log) - 1] = Stopped()  # as the host's interrupt makes it

    booth.during = stop
    trial.start()
    HeldThread.run_all()
    assert booth.log == [(False, WARM + 1), "interrupt", "restore"]
    assert trial.status()["reason"] == "stopped"


def test_stop_counts_between_pictures() -> None:
    booth = Booth()
    trial = trial_of(booth)
    booth.during = trial.stop  # too late for that picture
    trial.start()
    HeldThread.run_all()
    assert booth.log == [(False, WARM + 1), "interrupt", "restore"]
    assert trial.status()["state"] == "failed"


@pytest.mark.parametrize("place", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "error, reason", [(RuntimeError("out of memory\nmore"), "out of memory"), (KeyError("secret"), "it failed (KeyError), see the console")]
)
def test_an_error_leaves_nothing_behind(place, error, reason) -> None:
    booth = Booth()
    booth.raises[place] = error
    trial = trial_of(booth)
    trial.start()
    HeldThread.run_all()
    assert booth.log[-1] == "restore" and len(booth.log) == place + 1
    assert (trial.status()["state"], trial.status()["reason"]) == ("failed", reason)
    assert not booth.lock.locked()
    assert trial.start()[0]  # and again


def test_stop_without_one() -> None:
    booth = Booth()
    trial_of(booth).stop()
    assert booth.log == []
