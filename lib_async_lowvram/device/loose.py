"""Loose tensors: what moves with a network but not as packed weights - buffers, and parameters nobody can pack.

Problem: modules own buffers (`position_ids`, batch-norm statistics) that stock moves with their region, and now and then a
parameter that is sparse, quantised, or a tensor subclass. They are few and small; they go to the device when their network
(or, in a learning pass, their region) is entered and come back when it is left.

As under stock, a tensor object keeps its identity and only its `.data` moves, so aliases stay aliases. A tensor born in
inference mode cannot be re-pointed; another object stands in for it meanwhile. A clean device copy is dropped; one that was
written in place (its `_version` grew) or replaced is copied back (I5). Both directions block the host: this is never on the
path of a steady pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from lib_async_lowvram.device.dense import as_bytes, packable
from lib_async_lowvram.device.streams import Streams, align

_Place = tuple[weakref.ref, str, str]  # (module, "_buffers" or "_parameters", name)


def loose_bytes(modules: Iterable[nn.Module], unmanaged: Iterable[nn.Module] = ()) -> int:
    """Device bytes that `LooseTensors` over the same arguments would take."""
    found = _find(modules, {id(module) for module in unmanaged})
    return sum(align(tensor.numel() * tensor.element_size()) for tensor, _ in found if tensor.device.type != "meta")


def _find(modules: Iterable[nn.Module], unmanaged: set[int]) -> list[tuple[torch.Tensor, list[_Place]]]:
    """Each loose tensor object once, with everywhere it is registered."""
    found: dict[int, tuple[torch.Tensor, list[_Place]]] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found.setdefault(id(buffer), (buffer, []))[1].append((weakref.ref(module), "_buffers", name))
        for name, parameter in module._parameters.items():
            if parameter is not None and (id(module) in unmanaged or not packable(parameter)):
                found.setdefault(id(parameter), (parameter, []))[1].append((weakref.ref(module), "_parameters", name))
    return list(found.values())


class _Moved:
    """One tensor on the device: the object registered there now, what it was before, and the memory it has."""

    __slots__ = ("block", "device", "host", "original", "places", "shown", "version")

    def __init__(self, streams: Streams, original: torch.Tensor, places: list[_Place]) -> None:
        self.original, self.places = original, places
        self.host = original.detach() if original.is_inference() else original.data  # the latter raises for those
        self.block: torch.Tensor | None = None
        if packable(self.host, inference=True):
            source = as_bytes(self.host)
            self.block = streams.allocate(align(source.numel()))
            try:
                streams.copy(self.block[: source.numel()], source, streams.onload_stream)
                streams.synchronize(streams.record(streams.onload_stream))
            except BaseException:
                streams.free(self.block)
                raise
            self.device = self.block[: source.numel()].view(self.host.dtype).as_strided(self.host.shape, self.host.stride())
        else:
            self.device = self.host.to(streams.device)
        if original.is_inference():
            # Another object than `device`, so that data assigned to it is seen.
            self.shown = nn.Parameter(self.device, requires_grad=False) if isinstance(original, nn.Parameter) else self.device.detach()
            _register(places, self.shown)
        else:
            self.shown = original
            original.data = self.device
        self.version = self.shown._version


class LooseTensors:
    """The loose tensors of some modules, on the device from construction until `leave`. Out of memory in the constructor
    leaves everything on the host. `shared`: when they leave, autograd may keep views of what is on the device."""

    def __init__(self, streams: Streams, modules: Iterable[nn.Module], unmanaged: Iterable[nn.Module] = ()) -> None:
        self._streams = streams
        self._unmanaged = {id(module) for module in unmanaged}
        self._moved: list[_Moved] = []
        self.shared = False
        try:
            self.add(modules)
        except BaseException:
            self.leave()
            raise

    def add(self, modules: Iterable[nn.Module]) -> None:
        """Move those of `modules` that are not on the device yet."""
        streams = self._streams
        known = {id(tensor) for moved in self._moved for tensor in (moved.original, moved.shown)}
        with torch.inference_mode(False), torch.no_grad():
            for tensor, places in _find(modules, self._unmanaged):
                there = tensor.device == streams.device and streams.device.type != "cpu"
                if id(tensor) not in known and tensor.device.type != "meta" and not there:
                    self._moved.append(_Moved(streams, tensor, places))

    def host_tensors(self) -> list[torch.Tensor]:
        """The host copies of what has memory on the device now: nobody may read them meanwhile."""
        return [moved.host for moved in self._moved if moved.block is not None]

    def leave(self) -> None:
        """Back to the host: changed ones are copied, clean ones dropped. Idempotent."""
        streams = self._streams
        with torch.inference_mode(False), torch.no_grad():
            consumed = streams.record(streams.current_stream())
            while self._moved:
                moved = self._moved[-1]
                self._restore(moved, consumed)
                self._moved.pop()  # not before: after an error it is tried again
                if moved.block is not None:
                    if self.shared:
                        streams.share(moved.block, streams.current_stream())
                    streams.free(moved.block, (consumed,))

    def _restore(self, moved: _Moved, consumed: object) -> None:
        streams, shown = self._streams, moved.shown
        for place in moved.places:
            present = _registered(place)
            if present is not None and present is not shown:
                self._keep_newer(place, present, moved)
        same = _same_memory(shown, moved.device)
        if same and shown._version != moved.version and moved.block is not None:
            target = as_bytes(moved.host)
            streams.wait(streams.offload_stream, consumed)
            streams.copy(target, moved.block[: target.numel()], streams.offload_stream)
            streams.synchronize(streams.record(streams.offload_stream))
        if not same:
            # Somebody pointed it at other memory: that is the value now.
            shown.data = _to_host(shown, moved)
        elif shown is moved.original:
            if moved.block is not None:
                shown.data = moved.host
            elif shown.device.type != "cpu":
                shown.data = shown.data.to("cpu")
        else:
            _register([place for place in moved.places if _registered(place) is shown], moved.original)

    @staticmethod
    def _keep_newer(place: _Place, present: torch.Tensor, moved: _Moved) -> None:
        """Another tensor was registered meanwhile; it must not point at memory about to be given back."""
        if present.device.type == "meta" or not _needs_host_copy(present, moved):
            return
        if present.is_inference():
            copy = _to_host(present, moved)
            _register([place], nn.Parameter(copy, requires_grad=False) if isinstance(present, nn.Parameter) else copy)
        else:
            present.data = _to_host(present, moved)


def _registered(place: _Place) -> torch.Tensor | None:
    ref, table, name = place
    module = ref()
    return None if module is None else getattr(module, table).get(name)


def _register(places: list[_Place], tensor: torch.Tensor) -> None:
    for ref, table, name in places:
        module = ref()
        if module is not None:
            getattr(module, table)[name] = tensor


def _same_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor.device != other.device or tensor.shape != other.shape or tensor.dtype != other.dtype:
        return False
    if tensor.layout is not torch.strided or type(other) is not torch.Tensor:
        return True  # no address to compare: taken as it is
    return tensor.data_ptr() == other.data_ptr() and tensor.stride() == other.stride()


def _needs_host_copy(tensor: torch.Tensor, moved: _Moved) -> bool:
    if tensor.device.type != "cpu":
        return True
    if moved.block is None or tensor.layout is not torch.strided:
        return False
    return tensor.untyped_storage().data_ptr() == moved.block.untyped_storage().data_ptr()


def _to_host(tensor: torch.Tensor, moved: _Moved) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True) if _needs_host_copy(tensor, moved) else tensor.detach()
