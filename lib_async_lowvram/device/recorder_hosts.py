"""The part of the ordering judge that is about host threads which wait, and copy, by themselves.

Problem: a thread that fills pinned memory for copies to come reads masters and writes what the device reads next, without any
stream in between: its accesses are those of a host thread, and lie behind what that thread has waited for.

Mixed into `RecordingStreams`, whose lock and books these methods use. Any thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .happens_before import Clock, OrderingViolation, join
from .streams import Event, Streams


class HostWork(Streams):
    """See the module."""

    def known(self) -> Clock:
        """What the calling thread knows to be done, for `learn`."""
        with self._lock:
            return dict(self._actors.host().clock)

    def learn(self, known: Clock) -> None:
        """The calling thread goes on behind one that knew this, by means nobody sees here: it was started or joined by it, or
        told through a queue."""
        with self._lock:
            join(self._actors.host().clock, known)

    def outwait(self, event: Event) -> None:
        event = self._mine(event)
        self.inner.outwait(event.inner)
        with self._lock:
            host = self._actors.host()
            self._actors.tick(host, f"wait for op {event.operation.number}")
            join(host.clock, event.clock)

    def failed(self, event: Event) -> bool:
        """Nothing behind a copy that failed happens: what was discarded behind it is still there, and may be saved."""
        event = self._mine(event)
        if not self.inner.failed(event.inner):
            return False
        with self._lock:
            for after, where in self._discarded:
                if event.operation.before(after):
                    self._history.forget(*where)
        return True

    def _note_discard(self, after: Event, where: tuple[int, int]) -> None:
        self._discarded.append((after.clock, where))

    def elapsed(self, start: Event, end: Event) -> float:
        mine = self._mine(start), self._mine(end)
        with self._lock:
            known = self._actors.host().clock
            for event in mine:
                if not event.operation.before(known):
                    raise OrderingViolation(f"the time of {event.operation} is asked for by a thread that does not know it to be done")
        return self.inner.elapsed(mine[0].inner, mine[1].inner)

    def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        for tensor in (destination, source):
            self.register_host(tensor)
        self.use(reads=[source], writes=[destination], what=f"copy {source.numel()} bytes on the host")
        self.inner.copy_on_host(destination, source)

    def read_on_host(self, destination: torch.Tensor, read: Callable[[torch.Tensor], None]) -> None:
        self.register_host(destination)
        self.use(writes=[destination], what=f"read {destination.numel()} bytes from a file")
        self.inner.read_on_host(destination, read)
