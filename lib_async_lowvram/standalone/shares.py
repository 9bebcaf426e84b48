"""How one amount of memory is shared between weights, what computing with them takes, and activations.

Problem: `--memory` is one figure, and on the CPU everything comes out of it: what the mover holds of the weights (at least two of the
largest, I2), the ring that they are read through, the copies that are made of a weight while it is computed with (in another
type; rearranged by the library), and activations, which get the rest. On a GPU the ring is in main memory and does not count.

Pure. Bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from lib_async_lowvram.device.staging import ring_bytes_for
from lib_async_lowvram.standalone.errors import CannotMake

MIB = 1 << 20
STAGING_LIMIT = 64 * MIB
"""Of page-locked memory: the ring takes what it needs of it, 32 MB at most."""

SMALL = 16 * MIB
"""Of the weights' share beyond two of the largest: those too small to be worth a copy each."""

BESIDE = 48 * MIB
"""For what nobody counts: the interpreter's objects, buffers of the allocator and of the libraries' threads."""


@dataclass(frozen=True)
class Shares:
    """weights: the mover's budget. activations: the rest."""

    weights: int
    activations: int


def split(total: int, largest: int, stored_itemsize: int, itemsize: int, on_cpu: bool) -> Shares:
    """For networks whose largest weight has `largest` bytes, stored in values of `stored_itemsize`, computed with in `itemsize`.
    `CannotMake` where nothing is left for activations, with the least that would do."""
    copy = largest * itemsize // stored_itemsize
    rearranged = copy if on_cpu else 0  # the library's own layout of it
    converted = copy if itemsize != stored_itemsize else 0
    staging = ring_bytes_for(largest, STAGING_LIMIT) if on_cpu else 0
    least = 2 * largest + SMALL
    beside = converted + rearranged + staging + BESIDE
    room = total - beside
    if room < 2 * least:
        # The largest of the networks needs this much for its weights; as much again is little enough for activations.
        if room - least < 64 * MIB:
            raise CannotMake(f"{total // MIB} MB are too little for this model: {(beside + least) // MIB + 64 + 1} MB at least")
        weights = least
    else:
        weights = max(least, room // 4)
    return Shares(weights, room - weights)
