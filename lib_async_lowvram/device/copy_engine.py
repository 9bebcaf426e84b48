"""One simulated copy engine: a thread that works through copies, waits and records in order, at a link's speed.

Problem: tests and the demo need copies that really run beside the computing, cost what a bus costs, and finish when they
finish, on a machine without a GPU.

Timing: the engine keeps a *link clock*. A copy starts at max(end of the one before, the time it became ready), ends
`latency + bytes / bandwidth` later, and the thread sleeps until then. Sleeping too long therefore delays one event but
never the schedule. Bytes are moved at the start of that window, by `ctypes.memmove`: it releases the GIL, starts no
OpenMP team, and no `TorchDispatchMode` sees it.

Errors: nothing that was submitted behind a copy that failed happens, and every event there carries its error, on whichever engine
waited for one; until a host thread has been told (`forget`). So nobody overwrites what a failed copy should have brought to
safety, and nobody computes with what it did not bring.

Threads: `submit`, `hold` and `stop` from any; everything else on the engine's own daemon thread, started at the first
submit (I7). The engine does not know the `SimulatedStreams` that owns it, so that one can be collected.
"""

from __future__ import annotations

import ctypes
import math
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .busy_wait import BusyWait
from .streams import Event

Operation = Callable[["CopyEngine"], None]


@dataclass
class Link:
    """What a copy on one engine costs. Read when a copy starts, so it may be changed at run time."""

    bandwidth: float
    """Bytes per second; `math.inf` for a link that costs only its latency."""
    latency: float
    """Seconds per copy."""
    jitter_seconds: float = 0.0
    """Each copy is held up by up to this before it starts and again before it counts as done."""
    fail_copy: Callable[[int], BaseException | None] | None = None
    """For tests: given the engine's count of copies so far, the error this one fails with."""
    on_copy: Callable[[str, float, float, int], None] | None = None
    """Called after each copy, on the engine's thread: lane, start and end (`time.perf_counter` seconds), bytes."""


class SimulatedEvent(Event):
    """Reached once, perhaps with the error of a copy before it."""

    __slots__ = ("_callbacks", "_condition", "_reached", "error", "reached_s", "timing")

    def __init__(self, *, timing: bool = False, reached_s: float | None = None) -> None:
        """`reached_s`: for an event that is reached at once."""
        self.timing = timing
        self.error: BaseException | None = None
        self.reached_s = reached_s
        self._reached = reached_s is not None
        self._condition = None if self._reached else threading.Condition()
        self._callbacks: list[Callable[[], None]] = []

    @property
    def reached(self) -> bool:
        return self._reached

    def reach(self, at_s: float, error: BaseException | None = None) -> None:
        with self._condition:
            self.reached_s, self.error = at_s, error
            # Callbacks go before anybody who waits: they are what must have happened before the event counts.
            for callback in self._callbacks:
                callback()
            self._callbacks = []
            self._reached = True
            self._condition.notify_all()

    def on_reach(self, callback: Callable[[], None]) -> None:
        """Run `callback` once the event is reached: now, or on the thread that reaches it, before any waiter goes on."""
        if not self._reached:
            with self._condition:
                if not self._reached:
                    self._callbacks.append(callback)
                    return
        callback()

    def block(self) -> None:
        """Block the calling thread until the event is reached."""
        if not self._reached:
            with self._condition:
                self._condition.wait_for(lambda: self._reached)


class CopyHold:
    """A closed gate before an engine's copies (see `SimulatedStreams.hold_copies`)."""

    def __init__(self, engines: tuple[CopyEngine, ...]) -> None:
        self._engines = engines

    def let_pass(self, copies: int = 1) -> None:
        """Let that many further copies of each held engine start."""
        for engine in self._engines:
            engine.permit(copies)


class CopyEngine:
    """See the module's docstring. Serves as the stream handle of its lane."""

    def __init__(self, lane: str, link: Link, seed: int, busy: bool = False) -> None:
        """`busy`: its thread stays awake shortly before a copy ends (`busy_wait`). It sleeps when there is no work: awake it would take the
        interpreter's lock, now and then, from whatever else is measured."""
        self.lane = lane
        self._busy = BusyWait() if busy else None
        self.link = link
        self.copies = 0
        self.link_clock_s = 0.0
        self.last_reached_s = 0.0
        self._random = random.Random(f"{seed}:{lane}")
        self._changed = threading.Condition()
        # A queue in C: what the host spends on handing over a copy is time that a real one would not take from the computing.
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._submitting = threading.RLock()  # nothing goes in behind the end; the garbage collector may `stop` in the middle
        self._thread: threading.Thread | None = None
        self._closed = False
        self._holds = 0
        self._permits = 0
        self._released_s = 0.0
        self.error: BaseException | None = None
        """Of the copy that failed, until somebody was told. On the engine's thread."""

    def __repr__(self) -> str:
        return f"<simulated {self.lane} stream>"

    # -- from any thread -----------------------------------------------------------------------------------------------
    def submit(self, operation: Operation) -> None:
        with self._submitting:
            if self._closed:
                raise RuntimeError(f"{self!r} is closed")
            self._queue.put(operation)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"async-lowvram-{self.lane}", daemon=True)
                self._thread.start()

    def hold(self) -> None:
        with self._changed:
            self._holds += 1

    def release(self) -> None:
        with self._changed:
            self._holds -= 1
            if not self._holds:
                self._permits = 0
                self._released_s = time.perf_counter()
            self._changed.notify_all()

    def permit(self, copies: int) -> None:
        with self._changed:
            self._permits += copies
            self._changed.notify_all()

    def stop(self) -> None:
        """Take nothing more; the thread ends when what is queued is done, holds or not. Idempotent."""
        with self._submitting:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        with self._changed:
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end of a stopped engine's thread."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- the engine's thread -------------------------------------------------------------------------------------------
    def _work(self) -> None:
        while True:
            operation = self._queue.get()
            if operation is None:
                return
            try:
                operation(self)
            except BaseException as error:  # noqa: BLE001 - whatever a copy or a hook raised belongs to the events that follow
                self.error = error
            del operation  # it keeps its tensors alive

    def begin_copy(self) -> int:
        """Wait at the gate; returns the number of this copy, from 0."""
        with self._changed:
            if self._holds and not self._closed:
                self._changed.wait_for(lambda: not self._holds or self._permits or self._closed)
                if self._holds and self._permits:
                    self._permits -= 1
                    self.link_clock_s = max(self.link_clock_s, time.perf_counter())
            self.link_clock_s = max(self.link_clock_s, self._released_s)  # held copies were ready no earlier
            number, self.copies = self.copies, self.copies + 1
        return number

    def inherit(self, event: SimulatedEvent) -> None:
        """Everything from here on comes after `event`."""
        event.block()
        self.link_clock_s = max(self.link_clock_s, event.reached_s)
        self.last_reached_s = max(self.last_reached_s, event.reached_s)
        self.error = event.error or self.error

    def forget(self, error: BaseException) -> None:
        """A host thread has been told; what it submits from here on happens again."""
        with self._submitting:
            if not self._closed and self._thread is not None:
                self._queue.put(lambda engine: setattr(engine, "error", None if engine.error is error else engine.error))

    def sleep_until(self, when_s: float) -> None:
        """Return at `when_s` (`time.perf_counter`), or a little later."""
        remaining = when_s - time.perf_counter()
        if not 0 < remaining < math.inf:
            return
        if self._busy is not None:
            self._busy.until(when_s)
        else:
            time.sleep(remaining)

    def delay(self) -> float:
        return self._random.uniform(0.0, self.link.jitter_seconds) if self.link.jitter_seconds > 0 else 0.0


class CopyOperation:
    """Move the bytes of `source` to `destination` in the time the link takes."""

    __slots__ = ("_destination", "_ready_s", "_source")

    def __init__(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._destination, self._source = destination, source
        self._ready_s = time.perf_counter()

    def __call__(self, engine: CopyEngine) -> None:
        number, link, nbytes = engine.begin_copy(), engine.link, self._source.numel()
        start = max(engine.link_clock_s, self._ready_s) + engine.delay()
        if engine.error is not None:
            return  # behind one that failed
        engine.sleep_until(start)
        error = link.fail_copy(number) if link.fail_copy is not None else None
        if error is None:
            ctypes.memmove(self._destination.data_ptr(), self._source.data_ptr(), nbytes)
        moved = time.perf_counter()
        deadline = start + link.latency + nbytes / link.bandwidth + engine.delay()
        engine.sleep_until(deadline)
        engine.link_clock_s = deadline
        # Where moving the bytes took longer than the link would have, that is when they were there.
        engine.last_reached_s = max(deadline, moved)
        if error is not None:
            raise error
        if link.on_copy is not None:
            link.on_copy(engine.lane, start, engine.last_reached_s, nbytes)
