"""`Trial`: stock and asynchronous moving in turn on the loaded model, for about ten seconds, so that a user sees what it gains.

Problem: "is it worth it on my machine?" has one honest answer: the same picture made both ways, on this model, at the size last used, in
the same minute. So a trial waits in the host's queue like any job, makes a small picture asynchronously, under stock, and
asynchronously again (what warms up meanwhile must not favour either), and compares seconds per pass through the UNet and every byte.

Invariants: whatever happens - an error, Interrupt, a stop - the switch is back where the user has it, and the host's queue is free.
Nothing is saved, and no script of anybody's runs. One trial at a time.

Threads: `start`, `stop`, `status` on threads of the HTTP server; the trial runs on a daemon thread of its own, made by `start`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from lib_async_lowvram.log import logger

WARM = 2
"""First passes of each picture that do not count: asynchronously one watches and one brings the residents."""

LEAST, MOST = 4, 24
"""Steps beyond them, per picture."""

PICTURE_SECONDS = 3.0
"""Aimed at for the steps of one picture; there are three."""


class Stopped(Exception):
    """The user wants no more of it."""


@dataclass(frozen=True)
class Made:
    """One picture: seconds from the start of each pass through the UNet to the next one's start, and its bytes."""

    pass_seconds: Sequence[float]
    pixels: bytes


class Pictures(Protocol):
    """What a trial needs of the host; see `trial_pictures`."""

    def queue(self) -> AbstractContextManager[Any]:
        """The host's turn-taking for jobs."""

    def refusal(self) -> str:
        """Why no trial can be made now, or ""."""

    def make(self, asynchronous: bool, steps: int) -> Made:
        """The same picture every time but for how weights move. Raises `Stopped` when the user interrupted it, `RuntimeError` with one
        line when it cannot be made that way."""

    def interrupt(self) -> None:
        """End the picture in the making soon."""

    def restore(self) -> None:
        """Weights move as the user's settings say again."""

    def describe(self) -> str:
        """Size and batch, for people."""

    def limit_seconds(self) -> float | None:
        """Per pass, for the last asynchronous picture."""


class Trial:
    """See the module."""

    def __init__(self, pictures: Pictures, thread: Callable[..., threading.Thread] = threading.Thread) -> None:
        self._pictures = pictures
        self._make_thread = thread
        self._lock = threading.Lock()
        self._state, self._reason, self._progress = "idle", "", 0.0
        self._result: dict[str, Any] | None = None
        self._stopping = False
        self.stock_pass_seconds: float | None = None
        """Of a pass under stock's moves, as last measured."""

    def status(self) -> dict[str, Any]:
        """{"state": idle | waiting | running | done | failed, "progress": 0 to 1, "reason", "result"}."""
        with self._lock:
            return {"state": self._state, "progress": self._progress, "reason": self._reason, "result": self._result}

    def start(self) -> tuple[bool, str]:
        """Queue a trial. Whether one was, and why not."""
        with self._lock:
            if self._state in ("waiting", "running"):
                return False, "a trial is under way already"
            reason = self._pictures.refusal()
            if reason:
                return False, reason
            self._state, self._reason, self._progress, self._result, self._stopping = "waiting", "", 0.0, None, False
        self._make_thread(target=self._run, name="async-lowvram-trial", daemon=True).start()
        return True, ""

    def stop(self) -> None:
        """End it; nothing where none is under way."""
        with self._lock:
            if self._state not in ("waiting", "running"):
                return
            self._stopping = True
            running = self._state == "running"
        if running:
            self._pictures.interrupt()

    # -- its own thread ------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            with self._pictures.queue():
                self._go_on("running", 0.0)
                try:
                    result = self._compare()
                finally:
                    self._pictures.restore()
            with self._lock:
                self._state, self._progress, self._result = "done", 1.0, result
            logger.info("trial, %(shape)s: stock %(stock_ms).0f ms per pass, asynchronously %(async_ms).0f ms", _in_ms(result))
        except Stopped:
            self._fail("stopped")
        except RuntimeError as error:
            self._fail(str(error).splitlines()[0] if str(error) else "it failed")
        except Exception as error:
            logger.exception("trial")
            self._fail(f"it failed ({type(error).__name__}), see the console")

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._state, self._reason = "failed", reason

    def _go_on(self, state: str, progress: float) -> None:
        with self._lock:
            if self._stopping:
                raise Stopped
            self._state, self._progress = state, progress

    def _compare(self) -> dict[str, Any]:
        # A first, short one under stock says how long a pass is, and warms up what both share.
        first = self._pictures.make(False, WARM + 1)
        steps = 1 + WARM + max(LEAST, min(MOST, int(PICTURE_SECONDS / max(first.pass_seconds[-1], 1e-6))))
        made: list[tuple[bool, Made]] = []
        for turn, asynchronous in enumerate((True, False, True)):
            self._go_on("running", 0.1 + 0.3 * turn)
            made.append((asynchronous, self._pictures.make(asynchronous, steps)))
        seconds = {
            way: median(second for each, picture in made if each is way for second in picture.pass_seconds[WARM:])
            for way in (True, False)
        }
        self.stock_pass_seconds = seconds[False]
        return {
            "passes": sum(len(picture.pass_seconds) - WARM for _, picture in made),
            "shape": self._pictures.describe(),
            "stock_seconds": seconds[False],
            "async_seconds": seconds[True],
            "limit_seconds": self._pictures.limit_seconds(),
            "ratio": seconds[False] / seconds[True] if seconds[True] else None,
            "equal": len({picture.pixels for _, picture in made}) == 1,
        }


def _in_ms(result: dict[str, Any]) -> dict[str, Any]:
    return {"shape": result["shape"], "stock_ms": 1e3 * result["stock_seconds"], "async_ms": 1e3 * result["async_seconds"]}
