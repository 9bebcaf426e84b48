"""Upscalers: models of the host that take the device in the middle of a job, and ask nobody.

Problem: in hires fix an upscaler's own model runs on the device between two networks of ours. Stock then has one module there,
the VAE that has just decoded; ours would be a whole resident set, sized from memory that was free before the upscaler came.
Its activations are large, and what it needs is never part of our budget.

Solution: whatever is ours leaves before any upscaler runs. That costs nothing: the VAE has decoded, and encodes next, which is
another network. Every upscaler of the host goes through `Upscaler.upscale`, also those of other extensions.

Called on the thread that runs the job; `patches` by `lowvram.Integration` as it starts and ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

MODULE = "modules.upscaler"


class Upscalers:
    """`leave`: makes everything of ours leave the device; never raises."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave

    def patches(self) -> Iterator[tuple[Any, str, Callable]]:
        """(owner, field, handler) for `patching`; none on a host that has no such class (imported long before our scripts)."""
        upscaler = getattr(sys.modules.get(MODULE), "Upscaler", None)
        if callable(getattr(upscaler, "upscale", None)):
            yield upscaler, "upscale", self._on_upscale

    def _on_upscale(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        self._leave()
        return stock(*args, **kwargs)
