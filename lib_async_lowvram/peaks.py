"""The most weight bytes on the device so far: in all, learning passes apart, and of each network.

Problem: only streamed passes are under the budget (I2), a learning pass holds what stock would; and whoever wonders where memory goes
wants to know it by network. The device has one counter of its peak, so it is read and started anew whenever what is going on
changes: one network has device memory at a time.

Called by `network`, `mover` and `status` under the mover's lock.
"""

from __future__ import annotations

from lib_async_lowvram.device.streams import Streams


class Peaks:
    """See the module. Bytes, by the device's allocation counter."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._learning = False
        self._network: str | None = None
        self._streamed = 0
        self._learned = 0
        self._of: dict[str, int] = {}

    def learning(self, on: bool) -> None:
        """A pass that moves whole regions begins or has ended."""
        if on != self._learning:
            self._take()
            self._learning = on

    def network(self, name: str | None) -> None:
        """What is allocated from here on is this network's; None: nobody's."""
        if name != self._network:
            self._take()
            self._network = name

    def forget(self, name: str) -> None:
        """The network is gone."""
        if name == self._network:
            self.network(None)
        self._of.pop(name, None)

    def _take(self) -> None:
        peak = self._streams.peak_allocated_bytes
        if self._learning:
            self._learned = max(self._learned, peak)
        else:
            self._streamed = max(self._streamed, peak)
        if self._network is not None:
            self._of[self._network] = max(self._of.get(self._network, 0), peak)
        self._streams.reset_peak()

    def read(self) -> tuple[int, int]:
        """(streamed passes, learning passes)."""
        self._take()
        return self._streamed, self._learned

    def of(self, name: str) -> int:
        """While that network had device memory, in passes of any kind. As of the last `read`."""
        return self._of.get(name, 0)
