"""Which parameters travel together: the units of one network, made from its modules and from what the learning pass saw.

Before learning, every module that owns parameters is a unit; modules that share bytes with each other are one (and cannot
stream, since a slot of one would leave the other behind). Learning then tells which modules fire. One that holds weights but
never fires - `MultiheadAttention.out_proj` - joins the unit of its nearest firing ancestor, which reads it; where there is
none, or where other units fire inside that ancestor (it would need its slot and theirs at once), it stays resident.

A rebuild keeps every unit it can: packing copies weights. Called under the mover's lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import nn

from lib_async_lowvram.device.dense import group_by_sharing
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.modules import Tree


class UnitTable:
    """Units by number and by member.

    Attributes:
        units: by index. unmanaged: weakly, modules whose parameters cannot be packed.
    """

    def __init__(self, host: HostMemory, share: bool = False) -> None:
        self._host = host
        self._share = share
        self.units: list[Unit] = []
        self._by_member: dict[int, Unit] = {}
        self._unmanaged: list[weakref.ref[nn.Module]] = []

    @property
    def unmanaged(self) -> list[nn.Module]:
        return [module for ref in self._unmanaged if (module := ref()) is not None]

    def unit_of(self, module: nn.Module) -> Unit | None:
        """The unit that `module` is a member of."""
        unit = self._by_member.get(id(module))
        return unit if unit is not None and any(ref() is module for ref in unit.members) else None

    def rebuild(self, tree: Tree) -> list[Unit]:
        """Make the units match `tree`; all of them must be on the host. Returns those that are no longer used."""
        present = {id(module): module for module in tree.modules}
        groups, unmanaged = group_by_sharing(tree.modules)
        self._unmanaged = [weakref.ref(module) for module in unmanaged]
        owners = [{id(unit): unit for module in group if (unit := self.unit_of(module)) is not None} for group in groups]
        dissolved: set[int] = set()
        for group, having in zip(groups, owners, strict=True):
            whole = len(having) == 1 and all(self.unit_of(module) is not None for module in group)
            for key, unit in having.items():
                complete = all((module := ref()) is not None and id(module) in present for ref in unit.members)
                if not whole or not complete or unit.shared != (len(group) > 1):
                    dissolved.add(key)
        kept: list[Unit] = []
        fresh: list[list[nn.Module]] = []
        for group, having in zip(groups, owners, strict=True):
            unit = next(iter(having.values()), None)
            if unit is None or id(unit) in dissolved:
                fresh.append(group)
            elif unit not in kept:
                kept.append(unit)
        dropped = [unit for unit in self.units if unit not in kept]
        self.units = kept
        self._by_member = {}
        for group in fresh:
            name = tree.names[id(group[0])]
            unit = Unit(0, name, group, self._host, self._share)
            unit.shared = unit.must_reside = len(group) > 1
            self.units.append(unit)
        self._number(tree)
        return dropped

    def join_silent(
        self, tree: Tree, fired: frozenset[int], inside: Mapping[int, frozenset[int]], never_anchor: Iterable[nn.Module]
    ) -> set[int]:
        """After a learning pass: give every unit an anchor that fires, or make it resident.

        Returns the indices of units announced by a firing anchor. `inside`: id of a module -> ids of those that fired while
        it ran. `never_anchor`: modules whose call is the whole pass; a unit anchored there is resident.
        """
        outer = {id(module) for module in never_anchor}
        modules = {id(module): module for module in tree.modules}
        joined: dict[int, list[Unit]] = {}
        for unit in self.units:
            unit.must_reside = unit.shared
            anchor = self._anchor(unit, tree, fired, outer)
            if anchor is None:
                unit.anchor = None
                unit.must_reside = True
            else:
                joined.setdefault(anchor, []).append(unit)
        for anchor, units in joined.items():
            module = modules[anchor]
            unit = units[0]
            if len(units) > 1:
                # One pack for all that this module reads itself.
                unit = Unit(0, tree.names[anchor], [ref() for each in units for ref in each.members], self._host, self._share)
                self.units = [each for each in self.units if each not in units] + [unit]
            unit.anchor = weakref.ref(module)
        anchors = {id(unit.anchor()) for unit in self.units if unit.anchor is not None}
        for unit in self.units:
            if unit.anchor is None:
                continue
            anchor = unit.anchor()
            contained = {id(module) for module in anchor.modules()} | inside.get(id(anchor), frozenset())
            if (contained - {id(anchor)}) & anchors:
                unit.must_reside = True
        self._number(tree)
        return {unit.index for unit in self.units if unit.anchor is not None}

    def _anchor(self, unit: Unit, tree: Tree, fired: frozenset[int], outer: set[int]) -> int | None:
        """Identity of the module whose call announces `unit`."""
        if unit.shared:
            return None  # whoever fires first, it must be there
        key = id(unit.anchor()) if unit.anchor is not None and unit.anchor() is not None else id(unit.members[0]())
        while key is not None and (key not in fired or key in outer):
            if key in outer:
                return None
            key = tree.parents.get(key)
        return key

    def _number(self, tree: Tree) -> None:
        place = {id(module): number for number, module in enumerate(tree.modules)}
        self.units.sort(key=lambda unit: place.get(id(unit.members[0]()), len(place)))
        self._by_member = {}
        for index, unit in enumerate(self.units):
            unit.index = index
            for ref in unit.members:
                if (module := ref()) is not None:
                    self._by_member[id(module)] = unit
