"""Who does things in order: the actors of the ordering judge, their clocks, and the log of what they did.

Problem: the judge must know, for each operation, what surely lies before it. Streams, host threads, the allocator and
discards are all actors with a vector clock (`happens_before.py`).

Invariant: an operation enqueued on a stream learns what its host thread knows (what that thread waited for, and did
itself), never what the thread enqueued elsewhere.

Called by `recorder.py` under its lock; answers for the calling thread.
"""

from __future__ import annotations

import threading
from collections import deque

from .happens_before import Clock, Operation, join
from .streams import Stream


class Actor:
    """One thing that works in order, and what lies before its next operation."""

    __slots__ = ("clock", "id", "name")

    def __init__(self, id: int, name: str) -> None:
        self.id, self.name = id, name
        self.clock: Clock = {id: 0}


class Actors:
    """All actors of one recording.

    Attributes:
        hosts: the host threads that showed up so far.
        lanes: actors of discards.
        log: the last operations, newest last. `operations`: how many there were.
    """

    def __init__(self, log_length: int) -> None:
        self.hosts: list[Actor] = []
        self.lanes: list[Actor] = []
        self.log: deque[Operation] = deque(maxlen=log_length)
        self.operations = 0
        self._count = 0
        self._streams: dict[Stream, Actor] = {}
        self._local = threading.local()

    def new(self, name: str) -> Actor:
        """A further actor."""
        self._count += 1
        return Actor(self._count, name)

    def host(self) -> Actor:
        """The calling thread's own."""
        actor = getattr(self._local, "host", None)
        if actor is None:
            actor = self._local.host = self.new(f"host thread {threading.current_thread().name}")
            self.hosts.append(actor)
        return actor

    def stream(self, stream: Stream, name: str | None = None) -> Actor:
        """The stream's. `name`: when it is not the calling thread's compute stream."""
        actor = self._streams.get(stream)
        if actor is None:
            actor = self._streams[stream] = self.new(name or f"compute stream of {threading.current_thread().name}")
        return actor

    def lane(self, clock: Clock) -> Actor:
        """An actor for one discard that comes after `clock`. Discards do not wait for each other, so they may share an
        actor only where one is ordered after the actor's last anyway; that needs no more of them than there are slots."""
        for lane in self.lanes:
            if clock.get(lane.id, 0) >= lane.clock[lane.id]:
                return lane
        lane = self.new(f"discard lane {len(self.lanes)}")
        self.lanes.append(lane)
        return lane

    def tick(self, actor: Actor, what: str) -> Operation:
        """Log the actor's next operation."""
        tick = actor.clock[actor.id] = actor.clock.get(actor.id, 0) + 1
        self.operations += 1
        operation = Operation(self.operations, actor.id, tick, actor.name, what)
        self.log.append(operation)
        return operation

    def enqueue(self, actor: Actor, what: str) -> Operation:
        """Log an operation that the calling thread gives to `actor`."""
        join(actor.clock, self.host().clock)
        return self.tick(actor, what)
