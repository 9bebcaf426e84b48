"""Device memory of one network while it is in use: one slab for the ring, one block per resident unit.

Everything is allocated when the network is entered and given back when it is left; between the two nothing is allocated
(I2). Residents have blocks of their own so that one can be given up without the others. We own this memory: it is freed
only behind the events of its last uses, never through `record_stream`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lib_async_lowvram.device.streams import Event, Stream, Streams


class Arena:
    """The slab and the blocks. Raises torch's out-of-memory error from the constructor, having given back what it got."""

    def __init__(self, streams: Streams, ring_bytes: int, resident_bytes: Mapping[int, int]) -> None:
        self._streams = streams
        self._slab: torch.Tensor | None = None
        self._blocks: dict[int, torch.Tensor] = {}
        try:
            if ring_bytes:
                self._slab = streams.allocate(ring_bytes)
            for unit, nbytes in resident_bytes.items():
                self._blocks[unit] = streams.allocate(nbytes)
        except BaseException:
            self.close(())
            raise

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        """`nbytes` of the slab from `offset`: uint8."""
        return self._slab[offset : offset + nbytes]

    def block(self, unit: int, nbytes: int) -> torch.Tensor:
        """The block of a resident unit; made now if it has none or too small a one (a unit that was packed anew)."""
        block = self._blocks.get(unit)
        if block is None or block.numel() < nbytes:
            self.release_block(unit, (self._streams.record(self._streams.current_stream()),))
            block = self._blocks[unit] = self._streams.allocate(nbytes)
        return block[:nbytes]

    @property
    def blocks(self) -> list[torch.Tensor]:
        """All memory held."""
        return [*([] if self._slab is None else [self._slab]), *self._blocks.values()]

    def share(self, stream: Stream) -> None:
        """Autograd may keep views of all of it, and read them on `stream`."""
        for block in self.blocks:
            self._streams.share(block, stream)

    def adopt(self, unit: int, block: torch.Tensor) -> None:
        """A block allocated elsewhere is this resident unit's from now on."""
        self._blocks[unit] = block

    def release_block(self, unit: int, after: tuple[Event, ...]) -> None:
        """Give one unit's block back behind `after`; nothing if it has none."""
        block = self._blocks.pop(unit, None)
        if block is not None:
            self._streams.free(block, after)

    def close(self, after: tuple[Event, ...]) -> None:
        """Give everything back behind `after`. Idempotent. The caller has dropped its views."""
        for unit in list(self._blocks):
            self.release_block(unit, after)
        if self._slab is not None:
            self._streams.free(self._slab, after)
            self._slab = None
