"""`Looking`: what one may ask a mover while it works - figures, a timeline, a trace - and what passes have taught it.

Split from `mover`, whose other methods change something; these only read, or say where to write to. From any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lib_async_lowvram.activations import Activations
from lib_async_lowvram.backups import Backups
from lib_async_lowvram.context import Context
from lib_async_lowvram.core.stats import Trace
from lib_async_lowvram.device.streams import Event
from lib_async_lowvram.measured import Measured
from lib_async_lowvram.network import Network
from lib_async_lowvram.status import describe, shown_of


class Looking:
    """The part of `AsyncModelMover` that answers questions."""

    _context: Context
    _networks: dict[str, Network]
    _current: Network | None
    backups: Backups
    demoted: str
    last_error: str

    @property
    def in_pass(self) -> bool:
        return self._current is not None and self._current.in_pass

    @property
    def current_network(self) -> str | None:
        """Name of the network that has device memory, or None."""
        return self._current.name if self._current is not None else None

    @property
    def known(self) -> tuple[Measured, Activations]:
        """What passes on this device have shown; may be given to another mover on the same device."""
        return self._context.measured, self._context.activations

    @known.setter
    def known(self, known: tuple[Measured, Activations]) -> None:
        """Before anything is attached."""
        self._context.measured, self._context.activations = known

    @property
    def keep_free(self) -> Callable[[str, tuple | None, int], int] | None:
        """See `Context.keep_free`."""
        return self._context.keep_free

    @keep_free.setter
    def keep_free(self, keep_free: Callable[[str, tuple | None, int], int] | None) -> None:
        self._context.keep_free = keep_free

    @property
    def trace(self) -> Trace | None:
        """Where spans of the streams go while set."""
        return self._context.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._context.trace = trace

    def timeline(self, previews: Iterable[tuple[Event, Event]] = ()) -> dict[str, Any]:
        """See `Timeline.describe`: of the network used most its newest timed pass; the next one will be timed. JSON-ready."""
        with self._context.lock:
            shown = shown_of(self._networks, self._current)
            self._context.timeline.ask()
            return self._context.timeline.describe(shown and shown.name, previews)

    def status(self) -> dict[str, Any]:
        """What DESIGN.md's Status lists, and more; JSON-ready. Bytes, seconds."""
        with self._context.lock:
            described = describe(self._context, self._networks, self._current, self.demoted, self.last_error)
            backups = {"backup_bytes_from_masters": self.backups.copied_bytes, "restore_bytes_spared": self.backups.spared_bytes}
            return {**described, **backups}
