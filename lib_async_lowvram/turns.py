"""Whose turn it is: passes run one at a time over all networks of a mover, and what others ask for waits until none is open.

Problem: a host's threads come as they like: a second request starts a pass, an API call drains, a settings page configures. In the
middle of another thread's pass the first has to wait, and the others' wishes are kept until that pass ends.

Called by `mover`, which holds its lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network

PATIENCE_SECONDS, LOOK_SECONDS = 120, 0.1


class Turns:
    """See the module. `turn`: of the mover's lock; notified when a pass ends. `current`: the network in use, if any."""

    def __init__(self, turn: threading.Condition, current: Callable[[], Network | None]) -> None:
        self._turn = turn
        self._current = current
        self._deferred: list[Callable[[], None]] = []

    def _elsewhere(self) -> Network | None:
        """The network that another thread is in the middle of a pass of."""
        current = self._current()
        return current if current is not None and current.thread != threading.get_ident() and current.busy else None

    def wait(self) -> None:
        """Block the calling thread while another one is in the middle of a pass: the WebUI's first picture may be asked for while the
        thread that loads the model still encodes its empty prompt. Not for ever: that thread might be waiting for this one, and taking
        the device from it would make its picture wrong."""
        until = time.monotonic() + PATIENCE_SECONDS
        while (current := self._elsewhere()) is not None:
            if time.monotonic() > until:
                raise RuntimeError(f"a pass of {current.name} on another thread has not ended in {PATIENCE_SECONDS} s")
            self._turn.wait(LOOK_SECONDS)  # one that was interrupted ends without telling anybody

    def between_passes(self, action: Callable[[], None]) -> None:
        """Do it now, or when the pass that another thread is in the middle of ends."""
        if self._elsewhere() is not None:
            self._deferred.append(action)
        else:
            action()

    def catch_up(self) -> None:
        """Do what was put off: no pass is open."""
        actions, self._deferred = self._deferred, []
        for action in actions:
            action()

    def ended(self) -> None:
        """A pass is over: do what was put off, and wake who waits."""
        self.catch_up()
        self._turn.notify_all()
