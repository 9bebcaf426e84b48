"""Which modules are managed, by anybody: two movers on one module would each take the other's copies for changes.

Held weakly, by module. A network claims its modules when it looks at its tree and gives them up when it is detached.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn

from lib_async_lowvram.modules import ModuleTree
from lib_async_lowvram.network_spec import NetworkSpec

_CLAIMED: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


def claim(modules: Iterable[nn.Module], owner: object) -> None:
    """`owner` (held weakly) manages these modules."""
    mine = weakref.ref(owner)
    for module in modules:
        _CLAIMED[module] = mine


def release(owner: object) -> None:
    """`owner` manages nothing any more."""
    for module, held_by in list(_CLAIMED.items()):
        if held_by() is owner or held_by() is None:
            del _CLAIMED[module]


def refuse_claimed(spec: NetworkSpec) -> None:
    """Raises `ValueError` when a module of `spec` is managed already; nothing has been touched then."""
    tree = ModuleTree(spec).scan()
    for module in [*tree.modules, *([spec.span] if spec.span is not None else [])]:
        held_by = _CLAIMED.get(module)
        if held_by is not None and held_by() is not None:
            raise ValueError(f"{tree.names.get(id(module), '')} ({type(module).__name__}) is already managed by a mover")
