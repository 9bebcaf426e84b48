"""Modules whose weights a contender puts on the device and takes back itself, waiting for every move.

Problem: the mover is compared with moves that are not its own: everything resident, and stock's blocks. On the simulated
device those must cost device memory and link time exactly as the mover's do, so they go through the same `Streams`.

Every parameter starts at a multiple of `ALIGNMENT` in one block of device memory, as from torch's allocator: a block of its
own, or one that several `Placed` use in turn, as torch's caching allocator would hand it out again and again. The host
tensors stay where they are between moves. Called on the thread that runs the model, with nothing in flight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from lib_async_lowvram.device.streams import Stream, Streams, align


class Placed:
    """The parameters of some modules, and where on the device they go. The modules share none with others, own no buffers,
    and their parameters are dense and contiguous (our UNet's are)."""

    def __init__(self, modules: Iterable[nn.Module], streams: Streams) -> None:
        self._streams = streams
        self._block: torch.Tensor | None = None
        self._owned = False
        self._parts: list[tuple[nn.Parameter, torch.Tensor, int]] = []
        end = 0
        for parameter in dict.fromkeys(p for module in modules for p in module.parameters()):
            if not parameter.is_contiguous():
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not contiguous")
            self._parts.append((parameter, parameter.data, end))
            end = align(end + parameter.numel() * parameter.element_size())
        self.nbytes = end
        """Bytes of device memory, padding included."""

    @property
    def on_device(self) -> bool:
        return self._block is not None

    def to_device(self, block: torch.Tensor | None = None) -> None:
        """Copy into `block` (from `Streams.allocate`, at least `nbytes` long; None: allocated here and freed by `to_host`),
        wait, publish. Raises torch's out-of-memory error when there is no room."""
        streams = self._streams
        self._owned = block is None
        self._block = streams.allocate(self.nbytes) if block is None else block
        for _, host, start in self._parts:
            source = _as_bytes(host)
            streams.copy(self._block[start : start + source.numel()], source, streams.onload_stream)
        self._finish(streams.onload_stream)
        for parameter, host, start in self._parts:
            nbytes = host.numel() * host.element_size()
            parameter.data = self._block[start : start + nbytes].view(host.dtype).view(host.shape)

    def to_host(self, *, copy: bool) -> None:
        """Back to the host tensors; `copy`: with the bytes, as stock does, else dropping them."""
        streams, block = self._streams, self._block
        if block is None:
            return
        if copy:
            self._finish(streams.current_stream())
            for _, host, start in self._parts:
                destination = _as_bytes(host)
                streams.copy(destination, block[start : start + destination.numel()], streams.offload_stream)
            self._finish(streams.offload_stream)
        used = streams.record(streams.current_stream())
        for parameter, host, _ in self._parts:
            parameter.data = host
        self._block = None
        if self._owned:
            streams.free(block, (used,))

    def _finish(self, stream: Stream) -> None:
        self._streams.synchronize(self._streams.record(stream))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
