"""Copies to the device of host memory that is not pinned, and of weights in a file: through a small pinned ring, filled by a thread
of its own.

Problem: a copy from pageable memory blocks whoever enqueues it until the driver has staged the bytes, and the thread that runs the
network has kernels to launch. So a thread of ours does what the driver would: it copies a piece of the master into the ring, and
enqueues that piece's copy on the onload stream, as long as there is work.

Invariants:
- A piece of the ring is filled again only when its last copy is done; the thread waits for that, nobody else.
- I8: the event of a `Staged` onload exists once its last piece is enqueued. Who needs it waits on the host until then (`event`);
  who wants the memory or the master back calls `let_go` first, after which no piece of it is enqueued any more.
- The onload stream was given its waits before the job was queued, so every piece comes behind them. What the master waits for (a
  write-back) the thread waits for on the host: it reads the master itself.
- An error belongs to the onload it happened in and is raised for whoever waits for that one; the thread goes on with the next.
- I7: the thread starts when a ring is made and ends when it is given back. It holds the ring and what is queued, no model and no
  mover: a `Stager` that is dropped ends it.

Threads: a `Stager` is used under its mover's lock; the thread takes no lock but the queue's.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from .host_memory import HostMemory
from .streams import Event, Streams, align
from .weight_file import FileMaster

logger = logging.getLogger("async_lowvram")

PIECE_BYTES = 16 << 20
"""The largest piece: long enough for a link to be at its best, short enough for two of them to be no matter."""

PIECES = 2
"""In the ring: one is filled while the other travels."""


def ring_bytes_for(largest: int, room: int) -> int:
    """Bytes of a ring for units of at most `largest` bytes, where `room` bytes may be pinned; 0 when that is too little."""
    piece = min(PIECE_BYTES, align(largest), room // PIECES // align(1) * align(1))
    return PIECES * piece


class StagingRing:
    """A block of host memory, taken in order and given back in order. Used by one thread."""

    def __init__(self, block: torch.Tensor) -> None:
        self.block = block
        self.piece_bytes = block.numel() // PIECES
        self._next = 0
        self._busy: deque[list[Any]] = deque()  # [start, end, event of its copy or None], oldest first

    def take(self, nbytes: int, streams: Streams) -> torch.Tensor:
        """The next `nbytes` (at most a piece), once the copies that read them are done. `copied` tells of the one to come."""
        start = self._next if self._next + nbytes <= self.block.numel() else 0
        end = start + nbytes
        while any(low < end and start < high for low, high, _ in self._busy):
            self._finish_oldest(streams)
        self._busy.append([start, end, None])
        self._next = align(end)
        return self.block[start:end]

    def put_back(self) -> None:
        """What was taken last is not copied after all."""
        self._busy.pop()

    def copied(self, event: Event) -> None:
        """`event` lies behind the copy of what was taken last."""
        self._busy[-1][2] = event

    def _finish_oldest(self, streams: Streams) -> None:
        _, _, event = self._busy[0]
        # None: an error came between; whatever was enqueued lies before this.
        streams.outwait(streams.record(streams.onload_stream) if event is None else event)
        self._busy.popleft()

    def finish(self, streams: Streams) -> None:
        """Wait until nothing reads the ring."""
        while self._busy:
            self._finish_oldest(streams)


class Progress(Enum):
    """Of a `Staged` onload."""

    QUEUED = "queued"
    RUNNING = "running"
    OVER = "over"  # enqueued whole, failed, or let go of


class Staged:
    """One onload on its way through the ring. Stands in for its event until that exists.

    Attributes:
        after: event of the write-back that the master waits for, or None.
    """

    __slots__ = ("_error", "_event", "_given_up", "_known", "_master", "_memory", "_timed", "_work", "after", "progress")

    def __init__(
        self,
        work: _Work,
        memory: torch.Tensor,
        master: torch.Tensor | FileMaster,
        after: Event | None,
        timed: Callable[[int, Event, Event], None] | None,
    ) -> None:
        self._work, self._memory, self._master, self._timed = work, memory, master, timed
        self.after = after
        self.progress = Progress.QUEUED
        self._given_up = False
        self._event: Event | None = None
        self._error: BaseException | None = None
        self._known = work.streams.known()

    @property
    def enqueued(self) -> bool:
        """Whether `event` would not wait."""
        return self.progress is Progress.OVER

    @property
    def came_to_nothing(self) -> bool:
        """Whether it is over, and did not bring everything: it was let go of, or failed."""
        return self.progress is Progress.OVER and self._event is None

    def event(self) -> Event:
        """Of the copy. Blocks the host until it is enqueued whole; raises what went wrong."""
        self._await()
        if self._error is not None:
            raise self._error
        if self._event is None:
            raise AssertionError("an onload was let go of, and is waited for")
        return self._event

    def let_go(self) -> None:
        """Nothing more of it is enqueued, nor read from its master, from here on. Blocks the host while a piece is being filled."""
        work = self._work
        with work.changed:
            self._given_up = True
            if self.progress is Progress.QUEUED:
                work.queue.remove(self)
                self._end()
        self._await()

    def _await(self) -> None:
        work = self._work
        with work.changed:
            work.changed.wait_for(lambda: self.progress is Progress.OVER)
        work.streams.learn(self._known)

    def fail(self, error: BaseException) -> None:
        """Under the lock: it will not get any further."""
        if self.progress is not Progress.OVER:
            self._error = error
            self._end()

    def _end(self) -> None:
        self._master = self._memory = self._timed = None  # the job may outlive what it was about
        self.progress = Progress.OVER

    # -- the copy thread -----------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Fill and enqueue piece by piece. Raises nothing."""
        work = self._work
        try:
            work.streams.learn(self._known)
            self._carry(work.ring, work.streams)
        except BaseException as error:  # noqa: BLE001 - it is raised for who waits for this onload
            self._error = error
        self._known = work.streams.known()
        with work.changed:
            self._end()
            work.changed.notify_all()

    def _carry(self, ring: StagingRing, streams: Streams) -> None:
        if self.after is not None:
            streams.outwait(self.after)  # if that failed, so does what the onload stream has behind it
        stream, memory, master = streams.onload_stream, self._memory, self._master
        start = None
        nbytes = master.numel()
        for offset in range(0, nbytes, ring.piece_bytes):
            end = min(offset + ring.piece_bytes, nbytes)
            piece = ring.take(end - offset, streams)
            if self._given_up:
                ring.put_back()
                return
            if isinstance(master, FileMaster):
                streams.read_on_host(piece, lambda into, start=offset: master.read(into, start))
            else:
                streams.copy_on_host(piece, master[offset:end])
            if self._timed is not None and start is None:
                start = streams.record(stream, timing=True)
            streams.copy(memory[offset:end], piece, stream)
            event = streams.record(stream, timing=start is not None)
            ring.copied(event)
            if self._given_up:
                return
        if start is not None:
            self._timed(nbytes, start, event)
        self._event = event


class _Work:
    """What the thread shares with its `Stager`, and all that it knows."""

    def __init__(self, ring: StagingRing, streams: Streams) -> None:
        self.ring = ring
        self.streams = streams
        self.changed = threading.Condition()
        self.queue: deque[Staged] = deque()
        self.running: Staged | None = None
        self.stopped = False

    def serve(self) -> None:
        """The thread."""
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(lambda: self.queue or self.stopped)
                    if self.stopped:
                        return
                    job = self.running = self.queue.popleft()
                    job.progress = Progress.RUNNING
                job.run()
                self.running = None
                del job  # it would be kept until the next one comes
        finally:
            self._fail_all()  # nobody is left waiting, whatever ended the thread

    def _fail_all(self) -> None:
        with self.changed:
            for job in (*self.queue, *([] if self.running is None else [self.running])):
                job.fail(RuntimeError("the thread that stages copies has ended"))
            self.queue.clear()
            self.running = None
            self.changed.notify_all()

    def stop(self) -> None:
        """Begin nothing more, and end. Takes no other lock: a dropped `Stager` is collected anywhere."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class Stager:
    """The ring and the thread of one mover, made when masters that are not pinned are about to travel.

    Attributes:
        ring_bytes: pinned for it now. 0: there is none, and such masters are copied straight.
        refused: a ring was wanted, and could not be had.
    """

    def __init__(self, streams: Streams, host: HostMemory) -> None:
        self.ring_bytes = 0
        self.refused = False
        self._streams = streams
        self._host = host
        self._work: _Work | None = None
        self._thread: threading.Thread | None = None
        self._finalizer: weakref.finalize | None = None

    def open(self, nbytes: int) -> bool:
        """Make a ring of `nbytes`, and start the thread; whether that could be done. Nothing is queued, and there is no ring."""
        block = self._host.allocate(nbytes)
        if not nbytes or not self._host.pin(block):
            return False
        self._work = _Work(StagingRing(block), self._streams)
        try:
            self._start()
        except RuntimeError as error:  # the system has no thread to spare
            self._work = None
            self._host.unpin(block)
            logger.warning("no thread for staged copies: %s", error)
            return False
        self.ring_bytes = nbytes
        self._finalizer = weakref.finalize(self, self._work.stop)
        self._finalizer.atexit = False  # a daemon thread ends with the interpreter
        return True

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work.serve, name="async-lowvram-staging", daemon=True)
        self._thread.start()

    def submit(
        self,
        memory: torch.Tensor,
        master: torch.Tensor | FileMaster,
        after: Event | None = None,
        timed: Callable[[int, Event, Event], None] | None = None,
    ) -> Staged:
        """Queue the copy of all of `master` into `memory` (as long, on the device), behind what the onload stream waits for now.
        `after`: of a write-back to the master. `timed`: is told bytes, and timing events around the copy, on the thread."""
        work = self._work
        job = Staged(work, memory, master, after, timed)
        if not self._thread.is_alive():
            self._start()  # something ended it
        with work.changed:
            work.queue.append(job)
            work.changed.notify_all()
        return job

    def settle(self) -> None:
        """Let go of everything queued, and wait on the host until the thread has no hand in anything."""
        work = self._work
        if work is None:
            return
        with work.changed:
            under_way = [*work.queue, *([] if work.running is None else [work.running])]
        for job in reversed(under_way):  # what has begun last: nothing follows it
            job.let_go()

    def close(self) -> None:
        """Give back the ring, and end the thread. Blocks the host until nothing reads the ring. Idempotent."""
        work, thread = self._work, self._thread
        if work is None:
            return
        self.settle()
        self._finalizer()
        if thread is not threading.current_thread():
            thread.join()
        work.ring.finish(self._streams)
        self._work = self._thread = None
        self.ring_bytes = 0
        self._host.unpin(work.ring.block)


def last_of(copied: Event | Staged | None, streams: Streams) -> Event | None:
    """The event behind which an onload does nothing more. One that is not enqueued yet never will be: nobody wants it any more."""
    if type(copied) is not Staged:
        return copied
    copied.let_go()
    return streams.record(streams.onload_stream)
