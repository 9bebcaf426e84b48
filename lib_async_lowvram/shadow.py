"""A second set of modules over the same masters: the same network on another thread, without a second copy of its weights.

Problem: one Parameter has one `.data` for all threads. Who decodes a preview while another network computes cannot publish
weights on the model's own Parameters: the sampling thread, or whoever looks at the model, would see them. And a deep copy of
the model would take its host memory a second time.

Solution: a deep copy of the module tree in which every Parameter is another object over the same host memory. Packing finds
it packed already (`Unit.pack`), so masters, pinned or not, are shared; a mover of its own moves it.

Invariant: a shadow only reads. It is true as long as the original's masters are those it was made over (`Shadow.holds`); a
change in place is seen by both, since the memory is one.

Called by `webui.preview_decoders` on the preview thread; `masters_of` by `AsyncModelMover.masters`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib_async_lowvram.core.states import UnitState

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


def masters_of(networks: Iterable[Network], current: Network | None) -> dict[int, torch.Tensor]:
    """id of each managed Parameter of these networks -> the host tensor that holds its value, changes made on the host included.
    True until somebody changes it. `current`: the one in use. Called under the mover's lock."""
    found: dict[int, torch.Tensor] = {}
    for network in networks:
        for unit in network.contents.units:
            if unit.state is UnitState.HOST and network is not current:
                network.contents.true_up(unit)
            for mine in unit.entries:
                found.update({id(seen): entry.master for entry in mine if (seen := entry.seen()) is not None})
    return found


class Shadow:
    """`module`: the copy. `host_of(parameter)`: the host tensor that holds a Parameter's value - its master, wherever the
    Parameter points now - or None for one that has none; then `ValueError`."""

    def __init__(self, original: nn.Module, host_of: Callable[[nn.Parameter], torch.Tensor | None]) -> None:
        memo: dict[int, object] = {}
        self._over: list[tuple[nn.Module, str, int]] = []
        with torch.inference_mode(False), torch.no_grad():
            for module in original.modules():
                for name, parameter in module._parameters.items():
                    if parameter is None:
                        continue
                    host = host_of(parameter)
                    if host is None:
                        raise ValueError(f"{type(module).__name__}.{name} has no master to share")
                    memo[id(parameter)] = nn.Parameter(host, requires_grad=False)
                    self._over.append((module, name, host.data_ptr()))
            self.module: nn.Module = copy.deepcopy(original, memo)
        # What others hooked onto the original, or put over its methods, is about the original, and would run it.
        for module in self.module.modules():
            module._forward_pre_hooks.clear()
            module._forward_hooks.clear()
            for name in [name for name, value in vars(module).items() if callable(value) and hasattr(type(module), name)]:
                delattr(module, name)

    def holds(self, host_of: Callable[[nn.Parameter], torch.Tensor | None]) -> bool:
        """Whether the original's weights still are in the memory that this was made over."""
        for module, name, address in self._over:
            parameter = module._parameters.get(name)
            host = None if parameter is None else host_of(parameter)
            if host is None or host.data_ptr() != address:
                return False
        return True
