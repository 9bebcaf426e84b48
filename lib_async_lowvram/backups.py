"""Backups of weights that somebody is about to change: what need not cross the link, because the master holds it.

Problem: who patches weights in place on the device (LoRA) first takes a copy to the host, and later writes it back to undo
the patch. Stock pays for both on the link, and blocks. But the host holds these bytes already: the master of a unit that
nobody has changed *is* the backup, so it is copied from there; and a weight that still holds what its backup holds - every
layer that the patch does not touch, and every layer right after its backup was taken - need not be restored at all, and then
counts as unchanged: no write-back either.

Invariant (I1, I5): `copy` gives exactly the bytes the parameter holds, and `holds` is True only if the parameter holds the
backup's; where that is not known - changed, replaced, written back only in part, not ours - both say so (None, False), and the
caller does what it did without us. Known means: same Parameter, same version, where publication put it.

Called inside a forward, on the thread that runs the network, by the WebUI's LoRA (`webui.lora`) and by `bench.patching`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib_async_lowvram.context import Context
from lib_async_lowvram.core.states import UnitState
from lib_async_lowvram.device.weights import Entry, Unit

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


class Backups:
    """See the module. `current`: the network in use, or None.

    Attributes:
        copied_bytes: of backups made from masters. spared_bytes: of restores that were not needed.
    """

    def __init__(self, context: Context, current: Callable[[], Network | None]) -> None:
        self._context = context
        self._current = current
        self._index: dict[int, tuple[Unit, Entry]] = {}  # by id of the Parameter
        self._indexed: tuple[int, int] = (0, 0)  # network and the state of its packing, that the index was made for
        self._known: weakref.WeakKeyDictionary[Entry, tuple[weakref.ref[torch.Tensor], int]] = weakref.WeakKeyDictionary()
        self.copied_bytes = 0
        self.spared_bytes = 0

    def forget(self, unit: Unit) -> None:
        """Somebody wrote to `unit` without a trace."""
        for mine in unit.entries:
            for entry in mine:
                self._known.pop(entry, None)

    def copy(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """The parameter's value as a new host tensor, strides kept, made from its master; None if the master may differ."""
        with self._context.lock:
            found = self._find(parameter)
            if found is None or not self._as_master(*found, parameter):
                return None
            entry = found[1]
            checker = self._context.checker
            if checker is None:
                backup = entry.master.clone()
            else:
                with checker.suspended():
                    backup = entry.master.clone()
            self.copied_bytes += entry.nbytes
            return backup

    def note(self, parameter: nn.Parameter, backup: torch.Tensor) -> None:
        """`parameter` holds `backup`'s value now; nobody writes to the latter."""
        with self._context.lock:
            found = self._find(parameter)
            if found is not None:
                self._known[found[1]] = (weakref.ref(backup), parameter._version)

    def holds(self, parameter: nn.Parameter, backup: torch.Tensor) -> bool:
        """Whether `parameter` is known to hold `backup`'s value: nobody has written to it since that was noted."""
        with self._context.lock:
            found = self._find(parameter)
            if found is None:
                return False
            unit, entry = found
            of, version = self._known.get(entry, (None, 0))
            known = of is not None and of() is backup and version == parameter._version
            if known and not unit.dirty and entry.is_published(parameter):
                self.spared_bytes += entry.nbytes
                return True
            return False

    def _as_master(self, unit: Unit, entry: Entry, parameter: nn.Parameter) -> bool:
        """Whether the device copy that `parameter` points at has the bytes of the master, and nobody is writing there."""
        if unit.state not in (UnitState.READY, UnitState.IN_USE, UnitState.WRITE_BACK) or unit.dirty:
            return False
        if unit.written is not None and not self._context.streams.done(unit.written):
            return False
        return entry.is_published(parameter) and parameter._version == entry.version

    def _find(self, parameter: nn.Parameter) -> tuple[Unit, Entry] | None:
        network = self._current()
        if network is None or self._context.config.always_write_back:
            return None  # where writes leave no trace, nothing is known
        contents = network.contents
        if self._indexed != (id(contents), contents.packings):
            self._indexed = (id(contents), contents.packings)
            self._index = {
                id(seen): (unit, entry)
                for unit in contents.units
                for mine in unit.entries
                for entry in mine
                if (seen := entry.seen()) is not None
            }
        found = self._index.get(id(parameter))
        return found if found is not None and found[1].seen() is parameter else None
