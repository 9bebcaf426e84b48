"""What one network holds: its modules, regions and units, and their masters - not how they move.

Problem: the tree may change between passes and parameters may be replaced at any time, while everything that moves weights
needs a consistent view of which unit is where. This is that view: rebuilt when the tree changed, joined after learning, and
the one place where masters are packed, pinned and adopted.

Modules are held weakly (I7). Called under the mover's lock, by `network`, `region_pass` and `streaming`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import nn

from lib_async_lowvram.claims import claim, release
from lib_async_lowvram.context import Context
from lib_async_lowvram.core.stats import Counters
from lib_async_lowvram.device.dense import packable
from lib_async_lowvram.device.loose import LooseTensors, loose_bytes
from lib_async_lowvram.device.staging import last_of
from lib_async_lowvram.device.weights import Change, Unit
from lib_async_lowvram.modules import ModuleTree
from lib_async_lowvram.network_spec import NetworkSpec
from lib_async_lowvram.unit_table import UnitTable


class Contents:
    """See the module.

    Attributes:
        announced: indices of units whose anchor's call announces them (after learning).
        packings: grows whenever any unit is packed.
        resized: an adopted unit changed its size since the flag was last taken: the plan no longer fits.
    """

    def __init__(self, spec: NetworkSpec, context: Context, counters: Counters) -> None:
        self._context = context
        self._counters = counters
        self._tree = ModuleTree(spec)
        self._table = UnitTable(context.host, context.shares_masters)
        self._fingerprint: tuple[int, ...] = ()
        self._region: dict[int, int] = {}
        self._modules: list[weakref.ref[nn.Module]] = []
        self._weightless: list[weakref.ref[nn.Module]] = []
        self.announced: frozenset[int] = frozenset()
        self.resized = False
        self.packings = 0
        self._loose: LooseTensors | None = None  # those on the device, while the network is in use
        context.pinning.join(self)
        self.rebuild()

    # -- modules -------------------------------------------------------------------------------------------------------
    @property
    def span(self) -> nn.Module | None:
        """The module one call of which is a pass."""
        return self._tree.span() if self._tree.span is not None else None

    @property
    def alive(self) -> bool:
        """False once the model is gone or has been emptied (moved to the meta device)."""
        return self._tree.alive and not any(
            parameter is not None and parameter.device.type == "meta"
            for unit in self.units[:1]
            for ref in unit.members
            if (module := ref()) is not None
            for parameter in module._parameters.values()
        )

    @property
    def changed(self) -> bool:
        """Whether modules were inserted, removed or replaced since the last look, or given weights where they had none."""
        if self._tree.fingerprint() != self._fingerprint or any(ref() is None for ref in self._modules):
            return True
        return any(value is not None for held in self._empty() for value in held.values())

    def _empty(self) -> list[dict[str, nn.Parameter | None]]:
        """The parameter tables of modules that could hold weights and held none at the last look."""
        return [module._parameters for ref in self._weightless if (module := ref()) is not None]

    @property
    def units(self) -> list[Unit]:
        """By index."""
        return self._table.units

    @property
    def unmanaged(self) -> list[nn.Module]:
        """Modules whose parameters cannot be packed; they move as loose tensors."""
        return self._table.unmanaged

    def modules(self) -> list[nn.Module]:
        """All modules that still exist."""
        return [module for ref in self._modules if (module := ref()) is not None]

    def to_observe(self) -> list[nn.Module]:
        """All modules and triggers but the span, each once."""
        triggers = [module for ref in self._tree.triggers if (module := ref()) is not None]
        span = self.span
        return list({id(module): module for module in [*self.modules(), *triggers] if module is not span}.values())

    def modules_of(self, region: int | None) -> list[nn.Module]:
        """Those of one region; None: those outside all regions."""
        return [module for module in self.modules() if self._region.get(id(module)) == region]

    def region_of(self, module: nn.Module) -> int | None:
        """The region that `module` announces or is in."""
        for number, trigger in enumerate(self._tree.triggers):
            if trigger() is module:
                return number
        return self._region.get(id(module))

    def units_of(self, region: int | None) -> list[Unit]:
        """Units of one region; None: those outside all regions, and those that several leaves share."""
        if region is None:
            return [unit for unit in self.units if unit.shared or self._region_of_unit(unit) is None]
        return [unit for unit in self.units if not unit.shared and self._region_of_unit(unit) == region]

    def _region_of_unit(self, unit: Unit) -> int | None:
        return self._region.get(id(unit.members[0]()))

    @property
    def loose_bytes(self) -> int:
        """Device bytes of buffers and unmanaged parameters."""
        return loose_bytes(self.modules(), self.unmanaged)

    # -- units ---------------------------------------------------------------------------------------------------------
    def rebuild(self) -> None:
        """Look at the tree again and make the units match. Everything must be on the host."""
        tree = self._tree.scan()
        self._table.rebuild(tree)
        self.packings += 1
        self._modules = [weakref.ref(module) for module in tree.modules]
        self._weightless = [
            weakref.ref(module)
            for module in tree.modules
            if module._parameters and all(value is None for value in module._parameters.values())
        ]
        self._region = tree.region
        self._fingerprint = self._tree.fingerprint()
        span = self.span
        claim([*tree.modules, *([] if span is None else [span])], self)
        self.announced = frozenset()
        self.pin()

    def join(self, fired: frozenset[int], inside: Mapping[int, frozenset[int]]) -> None:
        """A learning pass saw these modules (by id) fire, and some inside others: give every unit an anchor, or make it
        resident."""
        span = self.span
        self.packings += 1
        self.announced = frozenset(self._table.join_silent(self._tree.scan(), fired, inside, [] if span is None else [span]))
        self.pin()

    def pin(self) -> None:
        """Page-lock the masters as far as the limit goes."""
        self._guard(self.units)

    def _guard(self, units: Iterable[Unit]) -> None:
        self._context.pinning.pin(units)
        ranges = self._context.host_ranges
        if ranges is not None:
            for unit in units:
                if unit.nbytes and unit.in_file is None:
                    ranges.add(unit.master)

    def guard_loose(self, loose: LooseTensors, on: bool) -> None:
        """`loose` is on the device from now on, or no longer; nobody may read its host copies meanwhile."""
        self._loose = loose if on else None
        ranges = self._context.host_ranges
        if ranges is not None:
            for tensor in loose.host_tensors():
                (ranges.add if on else ranges.remove)(tensor)

    def true_up(self, unit: Unit) -> bool:
        """Before an onload of a unit that is on the host: take changes made there as the new truth. True when there are none."""
        change = unit.host_change()
        if change is Change.LAYOUT:
            self.adopt(unit)
        elif change is Change.VALUES or unit.dirty:
            unit.accept_versions()
        else:
            return True
        return False

    def adopt(self, unit: Unit) -> None:
        """Somebody put other tensors there: pack what is there now. Blocks the host, for copies in flight too: they read
        or write the master that is about to be let go of."""
        streams = self._context.streams
        for event in (last_of(unit.copied, streams), unit.written):
            if event is not None:
                streams.synchronize(event)
        unit.copied = unit.written = None
        self._counters.adopted += 1
        before = unit.nbytes
        unit.pack()
        self.packings += 1
        self._guard([unit])
        # What cannot be packed moves as a loose tensor: now, and with a place in the plan from the next pass on.
        members = [module for ref in unit.members if (module := ref()) is not None]
        loose = any(not packable(each) for module in members for each in module._parameters.values() if each is not None)
        self.resized = self.resized or loose or unit.nbytes != before
        if loose or unit.nbytes > before:
            self._context.ahead.give_up()  # whatever is fetched for another network, this one may need the room now
        entered = self._loose
        if loose and entered is not None:
            self.guard_loose(entered, False)
            entered.add(members)
            self.guard_loose(entered, True)

    def mark_dirty(self, module: nn.Module) -> Unit | None:
        """Somebody wrote `module`'s weights without a trace (through `.data`). Its unit, if they are ours."""
        unit = self._table.unit_of(module)
        if unit is not None:
            unit.dirty = True
            for parameter in module.parameters():
                for file in self._context.host.files:
                    if file.offset_of(parameter) is not None:
                        file.distrust(parameter)
        return unit

    def release(self) -> None:
        """No longer managed: the masters become ordinary host memory, and another mover may take the modules."""
        self.unpin()
        self._context.pinning.leave(self)
        self._context.gone.include(self._counters)
        release(self)

    def unpin(self) -> None:
        """The masters become ordinary host memory."""
        host = self._context.host
        with host.borrowers_held():
            for unit in self.units:
                if not unit.borrowed and unit.in_file is None:
                    host.unpin(unit.master)
