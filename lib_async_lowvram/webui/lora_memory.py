"""A LoRA layer that could not be patched for want of memory: noticed, instead of left as it is.

Problem: the built-in Lora extension patches a layer inside its forward. A `RuntimeError` on the way - torch's out-of-memory error is
one - is counted in `extra_network_lora.errors`, and the layer is marked as patched (`network_current_names`) all the same: the
picture goes on with a layer half patched or not at all, and so do all that follow. With residents on the device that happens where
stock would have had room.

Solution: while a pass can be repeated, that dictionary is one that looks at the error being counted, and lets it out if it is of
memory. So it passes through the forward before the layer is marked; what was patched completely stays patched, and marked; the layer
in question is restored from its backup and patched again when the pass is repeated. Errors of other kinds are counted as ever. The
dictionary is the extension's own again when the pass ends (I6); versions that count otherwise are left alone.

Called by `retry` on the thread that computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lib_async_lowvram.webui.lora import MODULE
from lib_async_lowvram.webui.memory_errors import out_of_memory


class Noticing(dict):
    """Stands in for the extension's count of errors by network. `repeatable`: whether the pass can be repeated.

    Attributes:
        noticed: whether an error was let out.
    """

    def __init__(self, errors: dict[str, int], repeatable: Callable[[], bool]) -> None:
        super().__init__(errors)
        self._repeatable = repeatable
        self.noticed = False

    def __setitem__(self, name: str, count: int) -> None:
        error = sys.exc_info()[1]  # counted in the block that handles it
        if out_of_memory(error) and self._repeatable():
            self.noticed = True
            raise error
        super().__setitem__(name, count)


@contextmanager
def noticing(repeatable: Callable[[], bool]) -> Iterator[Noticing]:
    """Inside, running out of memory while a layer is patched is an error like any other."""
    networks = sys.modules.get(MODULE)
    extra: Any = getattr(networks, "extra_network_lora", None)
    errors = getattr(extra, "errors", None)
    if not getattr(networks, "loaded_networks", None) or type(errors) is not dict:
        yield Noticing({}, repeatable)
        return
    extra.errors = stand_in = Noticing(errors, repeatable)
    try:
        yield stand_in
    finally:
        if extra.errors is stand_in:
            extra.errors = errors
            errors.clear()
            errors.update(stand_in)
