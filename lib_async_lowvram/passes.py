"""Between a network and the mover that holds several: one pass runs at a time, over all of them.

Called by `network` under the mover's lock; the mover is the one that answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


class Passes(Protocol):
    """What the networks of one device need of each other, since one pass runs at a time.

    Attributes:
        last_error: the newest one, in one line; for the status.
    """

    last_error: str

    def wait_for_turn(self) -> None:
        """A pass wants to start: returns when no other thread is in the middle of one. Raises `RuntimeError` when that takes too
        long to be anything but a deadlock."""

    def take_over(self, network: Network) -> bool:
        """It starts now: whatever else is in use is left. False for a network whose weights are gone: it has just been detached."""

    def ended(self, complete: bool) -> None:
        """It is over: what other threads asked for meanwhile is done now. `complete`: not cut short, nor about to be left."""
