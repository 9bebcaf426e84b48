"""Packed weights: the host master of one unit, what its parameters point at, and how a change by anyone is seen.

Problem: a leaf's weight and bias are separate tensors anywhere in host memory; copying them one by one wastes the link and
cannot be pinned exactly. A *unit* packs the parameters of its members into one host block, the *master*, and travels as one
copy.

**Ownership rule** (I4, I5). The master is the truth. Outside acquire..release a streamed unit's parameters point at views of
the master; inside, at views of device memory that holds the same bytes. Whoever wants to change a weight does it through the
Parameter, wherever that points: in place (its `_version` grows, assigning `.data` does not touch it), or by putting another
tensor or another Parameter there (pointer, dtype, shape or number differ). `host_change` and `device_change` look for exactly
that, at every acquire and release, by enumerating what the modules hold *now* - LoRA adds and removes biases. Views of one
slab share a version counter, so only a Parameter's `_version` is ever trusted. On the host, change weights only after
`AsyncModelMover.drain`, or accept that a pass already issued, whose copies may still be queued behind the computing, can see
the change; that is no concern for changes made inside a forward.

Modules and parameters are held weakly (I7). Layout: every tensor starts at a multiple of `ALIGNMENT` in the master
and on the device alike; strides are kept; tensors that are the same view of the same storage are packed once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import nn

from lib_async_lowvram.core.states import LEGAL, UnitState, transition
from lib_async_lowvram.device.dense import byte_range, packable
from lib_async_lowvram.device.entries import LAYOUT, NONE, VALUES, Change, Entry
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.staging import Staged
from lib_async_lowvram.device.streams import Event, align
from lib_async_lowvram.device.weight_file import CHANGED, FileMaster, WeightsChanged, master_in_file


class Unit:
    """What travels as one packed copy.

    Attributes:
        index: its number in its network; name: for people.
        anchor: weak reference to the module whose call acquires and releases it; None for a unit nobody announces.
        nbytes: of the pack, and of a slot for it. master: the host block, uint8; empty while `in_file` says where the bytes are instead.
        memory: its device memory (uint8), or None. copied, written: events of the onload and the write-back in question.
        borrowed: the master is somebody else's, who pins and unpins it.
        shared: several leaves hold the same bytes. must_reside: it cannot stream. resident: the plan keeps it on the device.
        pending: uses within the lookahead still to come. depth: acquires not yet released.
        accepted: grows whenever the master takes on bytes that somebody put there, or is another one.
        dirty: somebody said that it was changed. suspect: taken for changed whenever it was on the device.
    """

    def __init__(self, index: int, name: str, members: Iterable[nn.Module], host: HostMemory, share: bool = False) -> None:
        """`share`: use a block that holds exactly these parameters already as the master, instead of copying it. Only for who
        never writes (`shadow`): anybody else would change whatever the block belongs to."""
        self.index = index
        self.name = name
        members = list(members)
        self.members = tuple(weakref.ref(module) for module in members)
        self.anchor: weakref.ref[nn.Module] | None = self.members[0] if len(members) == 1 else None
        self.state = UnitState.HOST
        self.resident = False
        self.shared = False
        self.must_reside = False
        self.borrowed = False
        self.memory: torch.Tensor | None = None
        self.copied: Event | Staged | None = None
        self.written: Event | None = None
        self.pending = 0
        self.depth = 0
        self.accepted = 0
        self.dirty = False
        self.suspect = False
        self._bound_to = 0
        self._host = host
        self._share = share
        self.master: torch.Tensor | None = None
        self.in_file: FileMaster | None = None
        self.entries: tuple[tuple[Entry, ...], ...] = ()
        # Per member: itself, how many parameters it holds, the names of those that are None, and its entries.
        self._parts: tuple[tuple[weakref.ref[nn.Module], int, tuple[str, ...], tuple[Entry, ...]], ...] = ()
        self.pack()

    def __repr__(self) -> str:
        return f"<Unit {self.index} {self.name} {self.nbytes} bytes {self.state.value}>"

    def to(self, state: UnitState) -> None:
        """Change state; raises `IllegalTransition` on an edge that does not exist."""
        if state not in LEGAL[self.state]:
            transition(self.state, state)
        self.state = state

    @property
    def alive(self) -> bool:
        """Whether every member still exists."""
        return all(ref() is not None for ref in self.members)

    # -- packing -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def pack(self) -> None:
        """Make a master of what the members hold now, wherever that is, and point their parameters at it.

        The old master is left to whoever still uses it. Blocks the host when a parameter is on the device.
        """
        with torch.inference_mode(False):
            places: dict[tuple, int] = {}
            entries: list[tuple[Entry, ...]] = []
            parts: list[tuple[weakref.ref[nn.Module], int, tuple[str, ...], tuple[Entry, ...]]] = []
            sources: list[tuple[Entry, nn.Parameter]] = []
            size = 0
            for ref in self.members:
                module = ref()
                mine: list[Entry] = []
                held = module._parameters if module is not None else {}
                for name, parameter in held.items():
                    if parameter is None or not packable(parameter):
                        continue
                    # Tied parameters: the same bytes, perhaps seen through another shape, strides or dtype.
                    key = (parameter.device, *byte_range(parameter))
                    offset = places.get(key)
                    if offset is None:
                        offset = places[key] = size
                        size = align(size + parameter.numel() * parameter.element_size())
                    entry = Entry(name, parameter, offset)
                    mine.append(entry)
                    sources.append((entry, parameter))
                entries.append(tuple(mine))
                absent = tuple(name for name, parameter in held.items() if parameter is None)
                parts.append((ref, len(held), absent, entries[-1]))
            packed = self._packed(sources, size)
            self.in_file = master_in_file(self._host.files, [(parameter, entry.offset) for entry, parameter in sources], size)
            if packed is not None:
                self.master = packed
            else:
                self.master = self._host.allocate(0 if self.in_file is not None else size)
            for entry, parameter in sources:
                if self.in_file is not None:
                    entry.master_ptr = entry.master.data_ptr()
                else:
                    entry.point_at(self.master, parameter, copy=packed is None)
            self.borrowed = packed is not None
            self.nbytes = size
            self.entries = tuple(entries)
            self._parts = tuple(parts)
            self.unbind()
            self.accepted += 1
            self.dirty = False

    def leave_file(self) -> None:
        """The bytes are no longer the file's: have a master in main memory. Parameters that point at the file move there with what was
        written to them; those that point at the device are left alone, and their bytes are the caller's to copy. `WeightsChanged`."""
        if self.in_file is None:
            return
        if self.in_file.file.changed:
            # What somebody wrote since is whole; the rest would be read from what the file holds now.
            for parameter, entry in self.held() or ():
                at_home = parameter is not None and entry.looks_like(parameter, entry.master_ptr)
                if at_home and parameter._version == entry.version:
                    raise WeightsChanged(CHANGED)
        with torch.inference_mode(False), torch.no_grad():
            master = self._host.allocate(self.nbytes)
            for ref, _count, _absent, mine in self._parts:
                held = module._parameters if (module := ref()) is not None else {}
                for entry in mine:
                    parameter = held.get(entry.name)
                    at_home = parameter is not None and entry.looks_like(parameter, entry.master_ptr)
                    entry.point_at(master, parameter if at_home else None, copy=True)
            self.master, self.in_file = master, None

    def bytes_on_host(self) -> torch.Tensor:
        """What a copy to the device reads: the master, or a block of the caller's own, just read from the file. Raises as
        `WeightFile.read`."""
        if self.in_file is None:
            return self.master
        block = self._host.allocate(self.nbytes)
        self.in_file.read(block, 0)
        return block

    def _packed(self, sources: list[tuple[Entry, nn.Parameter]], size: int) -> torch.Tensor | None:
        """The block that holds exactly these parameters at these offsets already, if there is one and it may be shared."""
        if not sources or not self._share:
            return None
        storage = sources[0][1].untyped_storage()
        start = storage.data_ptr()
        if storage.nbytes() != size or not self._host.owns(storage):
            return None
        for entry, parameter in sources:
            if parameter.untyped_storage().data_ptr() != start or parameter.data_ptr() != start + entry.offset:
                return None
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,), (1,))

    def bind(self, memory: torch.Tensor) -> None:
        """Prepare views over `memory` (uint8 on the device, at least `nbytes`); cheap when it is the place of last time."""
        if memory is self.memory and self._bound_to:
            return
        self.memory = memory
        address = memory.data_ptr()
        if address == self._bound_to:
            return
        with torch.inference_mode(False), torch.no_grad():
            flat: dict[torch.dtype, torch.Tensor] = {}  # one view per dtype, not per entry: entering a network binds hundreds
            for mine in self.entries:
                for entry in mine:
                    whole = flat.get(entry.dtype)
                    if whole is None:
                        whole = flat[entry.dtype] = memory[: memory.numel() // entry.itemsize * entry.itemsize].view(entry.dtype)
                    start = whole.storage_offset() + entry.offset // entry.itemsize
                    entry.device = whole.as_strided(entry.shape, entry.stride, start)
                    entry.device_ptr = address + entry.offset
        self._bound_to = address

    def unbind(self) -> None:
        """Forget the device memory and every view over it."""
        self.memory = None
        self._bound_to = 0
        for mine in self.entries:
            for entry in mine:
                entry.device = None
                entry.device_ptr = 0

    # -- publication ---------------------------------------------------------------------------------------------------
    def publish(self) -> None:
        """Point the parameters at the device memory. The caller's stream has waited for the copy (I4)."""
        for ref, _count, _absent, mine in self._parts:
            module = ref()
            if module is None:
                continue
            held = module._parameters
            for entry in mine:
                held[entry.name].data = entry.device

    def publish_unchanged(self) -> bool:
        """`publish`, if nothing differs from the master and nobody said so: in one go, for nearly every use is so. False: something
        does, and nothing has been done."""
        found: list[tuple[nn.Parameter, Entry]] = []
        if self.dirty or self._change(False, found) is not NONE:
            return False
        for parameter, entry in found:
            parameter.data = entry.device
        return True

    def unpublish(self) -> None:
        """Point the parameters at the master again and take their versions as seen."""
        for ref, _count, _absent, mine in self._parts:
            module = ref()
            if module is None:
                continue
            held = module._parameters
            for entry in mine:
                parameter = held[entry.name]
                parameter.data = entry.master
                entry.version = parameter._version

    def unpublish_unchanged(self) -> bool:
        """`unpublish`, if `device_change` finds nothing. False: it does, and nothing has been done."""
        found: list[tuple[nn.Parameter, Entry]] = []
        if self.dirty or self.suspect or self._change(True, found) is not NONE:
            return False
        for parameter, entry in found:
            parameter.data = entry.master
        return True

    def held(self) -> list[tuple[nn.Parameter | None, Entry]] | None:
        """What the members hold now under each packed name, and its entry. None when they hold another number of parameters."""
        found = []
        for ref, count, absent, mine in self._parts:
            module = ref()
            if module is None:
                continue
            if sum(parameter is not None for parameter in module._parameters.values()) != count - len(absent):
                return None
            found += [(module._parameters.get(entry.name), entry) for entry in mine]
        return found

    def host_change(self) -> Change:
        """What differs from the master, looking at parameters that should point there."""
        return self._change(False)

    def device_change(self) -> Change:
        """What differs from what `publish` set, looking at parameters that should point at the device memory."""
        found = self._change(True)
        return VALUES if found is NONE and (self.dirty or self.suspect) else found

    def _change(self, on_device: bool, found: list[tuple[nn.Parameter, Entry]] | None = None) -> Change:
        """`found` takes all that was looked at, where nothing differs."""
        change = NONE
        for ref, count, absent, mine in self._parts:  # twice per use of each unit
            module = ref()
            if module is None:
                continue
            held = module._parameters
            if len(held) != count:
                if sum(parameter is not None for parameter in held.values()) != count - len(absent):
                    return LAYOUT
            elif absent:
                for name in absent:
                    if held.get(name, held) is not None:
                        return LAYOUT
            for entry in mine:
                parameter = held.get(entry.name)
                # `Entry.looks_like`, without the call.
                if (
                    parameter is None
                    or entry.seen() is not parameter
                    or parameter.data_ptr() != (entry.device_ptr if on_device else entry.master_ptr)
                    or parameter.dtype is not entry.dtype
                    or parameter.shape != entry.shape
                    or parameter.stride() != entry.stride
                ):
                    return LAYOUT
                if parameter._version != entry.version:
                    change = VALUES
                elif found is not None:
                    found.append((parameter, entry))
        return change

    def _written(self) -> bool:
        """Whether any version is another one than was seen last."""
        return any(parameter is not None and parameter._version != entry.version for parameter, entry in self.held() or ())

    def accept_versions(self) -> None:
        """Take the parameters' present versions as seen: their change has been dealt with."""
        if self.in_file is not None and (self.dirty or self._written()):
            self.leave_file()
        for ref, _count, _absent, mine in self._parts:
            module = ref()
            if module is None:
                continue
            for entry in mine:
                entry.version = module._parameters[entry.name]._version
        self.accepted += 1
        self.dirty = False
