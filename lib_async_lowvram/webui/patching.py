"""Functions of ours in front of the host's, removable in any order.

Problem: `modules.patches.undo` writes the original back whatever is there now. When another extension has patched over our
patch, undoing ours would throw theirs away; when we are loaded again while ours is still buried, `patch` would raise.
Invariant (I6): a patch of ours that somebody has patched over is not undone but made to pass through, and wakes up where
it lies when we come back. Each patched function is a *trampoline*: it calls its handler with the original in front, or the
original alone while it has no handler.
Called at start and close, on the thread that imports scripts. The trampolines run on whatever thread calls the host.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any

KEY = "async_lowvram"
"""The constant key under which `modules.patches` knows us: a module name would change when scripts are loaded again."""

# By id of the owner (a module or class of the host, which live as long as the process). Weak: a trampoline lives as long as
# the host, or whoever patched over it, holds it.
_trampolines: weakref.WeakValueDictionary[tuple[int, str], Callable] = weakref.WeakValueDictionary()


def _make_trampoline(original: Callable) -> Callable:
    @functools.wraps(original)
    def trampoline(*args: Any, **kwargs: Any) -> Any:
        handler = trampoline.handler
        if handler is None:
            return original(*args, **kwargs)
        return handler(original, *args, **kwargs)

    trampoline.handler = None
    return trampoline


def put(owner: Any, field: str, handler: Callable) -> None:
    """From now on `owner.field(...)` calls `handler(original, ...)`. `owner`: a module or a class of the host."""
    patches = importlib.import_module("modules.patches")
    name = (id(owner), field)
    known = _trampolines.get(name)
    registered = patches.original(KEY, owner, field) is not None
    if known is not None and registered:
        known.handler = handler  # ours is still in place, perhaps buried under somebody else's: it wakes up where it lies
        return
    if registered:
        # Whoever had patched over ours has gone and taken the trampoline along: what lies there now is not ours.
        patches.originals[KEY].pop((owner, field), None)
    trampoline = _make_trampoline(getattr(owner, field))
    trampoline.handler = handler
    patches.patch(KEY, owner, field, trampoline)
    _trampolines[name] = trampoline


def remove(owner: Any, field: str) -> None:
    """Undo `put`: the original goes back, or, where somebody has patched over ours, ours passes through from now on."""
    patches = importlib.import_module("modules.patches")
    trampoline = _trampolines.get((id(owner), field))
    if trampoline is None:
        return
    trampoline.handler = None
    if getattr(owner, field, None) is trampoline and patches.original(KEY, owner, field) is not None:
        patches.undo(KEY, owner, field)


def handler_of(owner: Any, field: str) -> Callable | None:
    """The handler now in force for `owner.field`, or None. This is how a script that is run again finds its integration."""
    trampoline = _trampolines.get((id(owner), field))
    return None if trampoline is None else trampoline.handler
