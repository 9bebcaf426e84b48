"""What computing needs on the device beside the weights, by network and size of the picture.

Problem: the automatic budget is what is free less what computing will take, and that is known only when it has been taken: a
picture twice as high and wide takes four times as much, the VAE takes more than the UNet. The device tells how far everything
that is not ours has ever grown (`Streams.activation_growth`); so a pass in which that figure grew is the one that needs it.

- A pass of a known size needs what it was seen to need.
- One of an unknown size needs no more than a larger one of the same network; else, what the others of that network needed, in
  proportion to the elements of the first argument, and a quarter more.
- Where nothing of the network is known: what anything was seen to need.

Bytes. Called by `network` and `context` under the mover's lock.
"""

from __future__ import annotations

import math

Key = tuple[str, tuple | None]
"""(name of the network, shapes of its arguments)"""

MARGIN = 1.25


class Activations:
    """See the module."""

    def __init__(self) -> None:
        self._needed: dict[Key, int] = {}
        self._most = 0

    def passed(self, key: Key, growth_bytes: int) -> None:
        """A pass is over; `growth_bytes`: the most that anything was seen to need so far."""
        if growth_bytes > self._most:
            self._needed[key] = self._most = growth_bytes

    def knows(self, key: Key) -> bool:
        """Whether such a pass was seen to need what `expected` says."""
        return key in self._needed

    def most(self, name: str) -> int | None:
        """The most that a pass of that network was seen to need, of any size. None: nothing is known, or no more than others'."""
        return max((needed for (other, _), needed in self._needed.items() if other == name), default=None)

    def expected(self, key: Key, growth_bytes: int) -> int:
        """What such a pass will need. `growth_bytes` as in `passed`, for networks of which nothing is known."""
        known = self._needed.get(key)
        if known is not None:
            return known
        name, shapes = key
        elements = _elements(shapes)
        mine = [(_elements(each), needed) for (other, each), needed in self._needed.items() if other == name]
        larger = [needed for size, needed in mine if size >= elements]
        if larger:
            return min(larger)
        scaled = [needed * elements / size for size, needed in mine if size]
        return int(MARGIN * max(scaled)) if scaled else growth_bytes


def _elements(shapes: tuple | None) -> int:
    return math.prod(shapes[0]) if shapes else 0
