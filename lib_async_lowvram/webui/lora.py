"""LoRA's backups, cheaper: the built-in extension takes them from masters and does not restore what nobody has changed.

Problem: for every layer with a name, and not only for those that it patches, the built-in Lora extension copies the weight
from the device to the host before it first changes anything, and back to the device before each change, waiting both times.
The masters hold these bytes already, and most of these restores change nothing (see `backups`).

Solution: `networks.store_weights_backup` and `networks.restore_weights_backup` ask first. What LoRA keeps, and what it writes,
stays what it was: the same bytes in tensors of the same kind, so that pictures, and what other extensions find in
`network_weights_backup`, are the same (I1). Versions of the extension that have no such functions are left alone.

Called inside forwards on the thread that computes; `patches` by `lowvram.Integration` as it starts and ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lib_async_lowvram.backups import Backups

MODULE = "networks"
"""The built-in extension's module, imported under this name by its own scripts."""

_MARKS = ("network_apply_weights", "store_weights_backup", "restore_weights_backup", "loaded_networks")


class LoraBackups:
    """`backups`: of the mover now open, or None."""

    def __init__(self, backups: Callable[[], Backups | None]) -> None:
        self._backups = backups

    def patches(self) -> Iterator[tuple[Any, str, Callable]]:
        """(owner, field, handler) for `patching`; none where the extension is absent or another version."""
        networks = sys.modules.get(MODULE)
        if networks is not None and all(hasattr(networks, name) for name in _MARKS):
            yield networks, "store_weights_backup", self._on_store
            yield networks, "restore_weights_backup", self._on_restore

    def _on_store(self, stock: Callable, weight: Any) -> Any:
        backups = self._backups()
        if backups is None or type(weight) is not nn.Parameter:
            return stock(weight)
        backup = backups.copy(weight)
        if backup is None:
            backup = stock(weight)
        backups.note(weight, backup)
        return backup

    def _on_restore(self, stock: Callable, obj: Any, field: str, weight: Any) -> Any:
        backups = self._backups()
        held = getattr(obj, field, None)
        if backups is None or weight is None or type(held) is not nn.Parameter:
            return stock(obj, field, weight)
        if backups.holds(held, weight):
            return None
        result = stock(obj, field, weight)
        if getattr(obj, field, None) is held and held.dtype is weight.dtype:
            backups.note(held, weight)
        return result
