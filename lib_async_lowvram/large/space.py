"""Where the activations of a large picture lie while it is computed in bands: on the device while they fit, else on the host.

Problem: at 2048x2048 one activation of the SD VAE is 2 GB in float16, and three of them live at once. Device memory is for the weights
and for the band that is computed; what waits is spilled to host memory, and only that: an activation lies on the device whenever its
share of the device has room, so the low resolutions, where most of the steps are, never travel.

A spilled activation is stored row after row (row, picture, channel, column), so that a band of full-width rows is one contiguous
piece and travels as one copy. Copies are waited for by the host: the memory may be unpinned as soon as nobody holds it, and a decode
that spills is bound by the link anyway. Host memory is the mover's own kind where one is given (`HostMemory`: page-aligned, pinned
within its limit, so that pinned bytes keep to what the user allowed), else ordinary memory. Where a folder is given (`DiskRoom`), what is
spilled lies in files there instead.

Every activation carries its channels' moments (count, mean, sum of squared deviations), taken from each band while it was written: a
group norm then needs no pass of its own over 2 GB. See `norm_statistics`.

Bytes throughout. One `Space` serves one picture on one thread.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lib_async_lowvram.large.disk_room import DiskRoom
from lib_async_lowvram.large.norm_statistics import Moments

if TYPE_CHECKING:
    from lib_async_lowvram.device.host_memory import HostMemory

WORKSPACE = 1.5
"""What a band is counted with, over the tensors that are seen: the convolution's own workspace, and rows made contiguous for it."""


class OutOfHostMemory(MemoryError):
    """The activations that are not computed on now fit neither the device's share nor the host's."""


class Space:
    """See the module.

    Attributes:
        device: where bands are computed. band_bytes: for the band in work. most_rows: of a band, whatever would fit; None: no limit.
        device_now, device_peak, host_now, host_peak: bytes of stored activations. band_peak: of the largest band, as counted.
        spilled, restored: bytes that went to the host and came back. pinned_now, pinned_peak: bytes of what is spilled that lie in
            page-locked memory. bands: how many were computed. fewest_rows, largest_rows: of a band, at its own resolution.
    """

    def __init__(
        self,
        device: torch.device,
        store_bytes: int,
        band_bytes: int,
        host_bytes: int,
        most_rows: int | None = None,
        host: HostMemory | None = None,
        disk: DiskRoom | None = None,
    ) -> None:
        """`disk`: where spilled activations lie instead of on the host; `host_bytes` limits them there."""
        self.disk = disk
        self.device, self.band_bytes, self.most_rows = device, band_bytes, most_rows
        self._store_bytes, self._host_bytes, self._host = store_bytes, host_bytes, host
        self.device_now = self.device_peak = self.host_now = self.host_peak = 0
        self.spilled = self.restored = self.pinned_now = self.pinned_peak = 0
        self.bands = self.band_peak = self.largest_rows = 0
        self.fewest_rows: int | None = None
        self._spare: dict[int, list[torch.Tensor]] = {}  # host blocks by size: the same few sizes come again and again

    def rows(self, fixed_bytes: int, row_bytes: int, height: int) -> int:
        """How many of `height` rows one band holds, when each takes `row_bytes` and the band itself `fixed_bytes`: as many as fit
        `band_bytes`, 1 at least."""
        room = int(self.band_bytes / WORKSPACE) - fixed_bytes
        rows = max(1, min(height, room // max(1, row_bytes)))
        if self.most_rows is not None:
            rows = min(rows, self.most_rows)
        rows = -(-height // -(-height // rows))  # equal bands, as nearly as whole rows allow
        self.note_band(rows, -(-height // rows), int(WORKSPACE * (fixed_bytes + rows * row_bytes)))
        return rows

    def note_band(self, rows: int, bands: int, band_bytes: int) -> None:
        """Bands have been cut: so many, each of so many rows."""
        self.band_peak = max(self.band_peak, band_bytes)
        self.bands += bands
        self.largest_rows = max(self.largest_rows, rows)
        self.fewest_rows = rows if self.fewest_rows is None else min(self.fewest_rows, rows)

    def store(self, shape: Sequence[int], dtype: torch.dtype) -> Stored:
        """Room for an activation of `shape` (picture, channel, row, column). `OutOfHostMemory` when there is none anywhere."""
        count, channels, height, width = shape
        nbytes, pinned = count * channels * height * width * dtype.itemsize, 0
        if self.device_now + nbytes <= self._store_bytes:
            data = torch.empty((count, channels, height, width), dtype=dtype, device=self.device)
            stored = Stored(self, data, tuple(shape), on_host=False)
            self.device_now += nbytes
            self.device_peak = max(self.device_peak, self.device_now)
        else:
            if self.host_now + nbytes > self._host_bytes:
                raise OutOfHostMemory(f"no room for an activation of {nbytes >> 20} MB beside {self.host_now >> 20} MB of others")
            if self.disk is not None:
                stored = StoredOnDisk(self, shape, dtype, self.disk)
            else:
                block = self._block(nbytes)
                stored = Stored(self, block.view(dtype).view(height, count, channels, width), tuple(shape), on_host=True)
                pinned = nbytes if self._host is not None and self._host.is_pinned(block) else 0
                weakref.finalize(stored, self._spare.setdefault(nbytes, []).append, block)
            self.host_now += nbytes
            self.host_peak = max(self.host_peak, self.host_now)
            self.pinned_now += pinned
            self.pinned_peak = max(self.pinned_peak, self.pinned_now)
        weakref.finalize(stored, self._gone, nbytes, stored.on_host, pinned)
        return stored

    def _block(self, nbytes: int) -> torch.Tensor:
        if self._spare.get(nbytes):
            return self._spare[nbytes].pop()
        # Of another size: what is spare now would be held beside it.
        self._spare.clear()
        if self._host is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        block = self._host.allocate(nbytes)
        self._host.pin(block)  # or not: then copies take longer
        return block

    def _gone(self, nbytes: int, on_host: bool, pinned: int) -> None:
        self.pinned_now -= pinned
        if on_host:
            self.host_now -= nbytes
        else:
            self.device_now -= nbytes


class Stored:
    """One activation. Written band by band, from the top; read in any order.

    Attributes:
        shape: (picture, channel, row, column). dtype. device: where rows are given. on_host: whether it is spilled.
        moments: of its channels, over what is written.
    """

    def __init__(self, space: Space, data: torch.Tensor, shape: tuple[int, ...], on_host: bool) -> None:
        self._space, self._data = space, data
        self.shape, self.dtype, self.device, self.on_host = shape, data.dtype, space.device, on_host
        self.moments = Moments()

    def write(self, top: int, band: torch.Tensor) -> None:
        """Rows from `top` on, computed on the device. Each row exactly once."""
        bottom = top + band.shape[2]
        self.moments.add(band)
        if self.on_host:
            self._data[top:bottom].copy_(band.permute(2, 0, 1, 3).contiguous())
            self._space.spilled += band.numel() * band.element_size()
        else:
            self._data[:, :, top:bottom] = band

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) on the device; a view where the activation lies there. Not to be written to."""
        if not self.on_host:
            return self._data[:, :, top:bottom]
        piece = self._data[top:bottom].to(self._space.device)
        self._space.restored += piece.numel() * piece.element_size()
        return piece.permute(1, 2, 0, 3)

    def whole(self) -> torch.Tensor:
        """All of it, on the device."""
        return self.rows(0, self.shape[2]).contiguous()


class StoredOnDisk(Stored):
    """One activation in a file, row after row (row, picture, channel, column)."""

    def __init__(self, space: Space, shape: Sequence[int], dtype: torch.dtype, disk: DiskRoom) -> None:
        super().__init__(space, torch.empty(0, dtype=dtype), tuple(shape), on_host=True)
        self._file = disk.file()
        count, channels, _, width = shape
        self._row = (count, channels, width)
        self._row_bytes = count * channels * width * dtype.itemsize

    def write(self, top: int, band: torch.Tensor) -> None:
        self.moments.add(band)
        rows = band.permute(2, 0, 1, 3).contiguous().cpu()
        self._file.write(top * self._row_bytes, rows)
        self._space.spilled += rows.numel() * rows.element_size()

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        piece = torch.empty((bottom - top, *self._row), dtype=self.dtype)
        self._file.read(top * self._row_bytes, piece)
        self._space.restored += piece.numel() * piece.element_size()
        return piece.to(self.device).permute(1, 2, 0, 3)
