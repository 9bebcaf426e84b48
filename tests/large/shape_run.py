"""What a model's activations take, found by running it on shapes alone: torch's meta device, and a count of what is alive.

How: the model and its inputs lie on the meta device, so that nothing is computed and a picture of any size costs nothing. A
`TorchDispatchMode` sees every operation, notes the storage of each result and its bytes, and after each operation counts the storages
that are still referenced by anybody; the largest sum is the peak. Inputs of an operation are alive while it is counted, as on a
device. Fused attention is taken as fused: it makes its output and nothing else, as flash and memory-efficient kernels do. Not seen:
what kernels allocate for themselves (convolution workspaces), the allocator's rounding and fragments.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class FusedAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` makes its output alone."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Attributes: peak: the most bytes of storages made inside that were alive at once. at: the operation after which."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.at = ""

    def ignore(self, *tensors: torch.Tensor) -> None:
        """These were there before."""
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    _known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_flatten(made)[0]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        total = sum(nbytes for _, nbytes in self._live.values())
        if total > self.peak:
            self.peak, self.at = total, str(function)
        return made


def peak_bytes(run: Any, *before: torch.Tensor) -> int:
    """Of `run()`, on the meta device; `before`: tensors that are not counted (weights, inputs)."""
    with torch.no_grad(), FusedAttention(), LiveBytes() as live:
        live.ignore(*before)
        run()
    return live.peak
