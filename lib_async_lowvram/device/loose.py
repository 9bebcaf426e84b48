"""Loose tensors: what moves with a network but not as packed weights - buffers, and parameters nobody can pack.

Problem: modules own buffers (`position_ids`, batch-norm statistics) that stock moves with their region, and now and then a
parameter that is sparse, quantised, or a tensor subclass. They are few and small; they go to the device when their network
(or, in a learning pass, their region) is entered and come back when it is left.

As under stock, a tensor object keeps its identity and only its `.data` moves, where torch allows that, so aliases stay
aliases. A clean device copy is dropped; one that was written in place (its `_version` grew) or replaced is copied back (I5).
Both directions block the host: this is never on the path of a steady pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from lib_async_lowvram.device.streams import Streams, align
from lib_async_lowvram.device.weights import as_bytes, packable


def loose_bytes(modules: Iterable[nn.Module], unmanaged: Iterable[nn.Module] = ()) -> int:
    """Device bytes that `LooseTensors` over the same arguments would take."""
    found = _find(modules, {id(module) for module in unmanaged})
    return sum(align(tensor.numel() * tensor.element_size()) for _, _, _, tensor in found if tensor.device.type != "meta")


def _find(modules: Iterable[nn.Module], unmanaged: set[int]) -> list[tuple[nn.Module, str, str, torch.Tensor]]:
    """(module, "_buffers" or "_parameters", name, tensor), each tensor object once."""
    found: dict[int, tuple[nn.Module, str, str, torch.Tensor]] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found.setdefault(id(buffer), (module, "_buffers", name, buffer))
        for name, parameter in module._parameters.items():
            if parameter is not None and (id(module) in unmanaged or not packable(parameter)):
                found.setdefault(id(parameter), (module, "_parameters", name, parameter))
    return list(found.values())


class LooseTensors:
    """The loose tensors of some modules, on the device from construction until `leave`."""

    def __init__(self, streams: Streams, modules: Iterable[nn.Module], unmanaged: Iterable[nn.Module] = ()) -> None:
        self._streams = streams
        self._moved: list[tuple[weakref.ref, str, str, torch.Tensor, int, torch.Tensor | None, int]] = []
        with torch.inference_mode(False), torch.no_grad():
            for module, table, name, tensor in _find(modules, {id(module) for module in unmanaged}):
                self._enter(module, table, name, tensor)

    def host_tensors(self) -> list[torch.Tensor]:
        """The host copies of what is on the device now: nobody may read them meanwhile."""
        return [host for _, _, _, host, _, _, _ in self._moved]

    def _enter(self, module: nn.Module, table: str, name: str, tensor: torch.Tensor) -> None:
        streams = self._streams
        host = tensor.data
        if host.device.type == "meta" or (host.device == streams.device and streams.device.type != "cpu"):
            return
        block = None
        if packable(host):
            source = as_bytes(host)
            block = streams.allocate(align(source.numel()))
            streams.copy(block[: source.numel()], source, streams.onload_stream)
            streams.synchronize(streams.record(streams.onload_stream))
            device = block[: source.numel()].view(host.dtype).as_strided(host.shape, host.stride())
        else:
            device = host.to(streams.device)
        tensor.data = device
        self._moved.append((weakref.ref(module), table, name, host, tensor._version, block, device.data_ptr() if block is not None else 0))

    def leave(self) -> None:
        """Back to the host: changed ones are copied, clean ones dropped. Idempotent."""
        streams = self._streams
        with torch.inference_mode(False), torch.no_grad():
            consumed = streams.record(streams.current_stream())
            for ref, table, name, host, version, block, pointer in self._moved:
                module = ref()
                tensor = getattr(module, table).get(name) if module is not None else None
                if tensor is not None and (block is None or tensor.data_ptr() != pointer):
                    # Somebody put another tensor there, or it is of a kind we cannot look into: keep the newer one.
                    if tensor.device.type != "meta" and tensor.device.type != "cpu":
                        tensor.data = tensor.data.to("cpu")
                elif tensor is not None:
                    if tensor._version != version:
                        target = as_bytes(host)
                        streams.wait(streams.offload_stream, consumed)
                        streams.copy(target, block[: target.numel()], streams.offload_stream)
                        streams.synchronize(streams.record(streams.offload_stream))
                    tensor.data = host
                if block is not None:
                    streams.free(block, (consumed,))
            self._moved.clear()
