"""In which floating-point type networks compute, where their weights are stored in another one.

Problem: checkpoints hold half precision. GPUs compute in it; most CPUs do not, or slower than in float32, and converting a model would
make it twice as large. So weights stay as they are and are converted leaf by leaf, in the call that uses them and for its length.

`Computing` is a mode of torch: inside, convolutions, linear layers and norms get their weights in the type of what they are applied to, and
embeddings answer in the mode's type. No module is touched, so whoever moves weights sees the same modules as ever. Where a part of a
network runs several times in a row (`large.chunks`), what was converted for it is kept until its last time (`keeping`): a part's weights
are few.

Figures (one thread of a CPU with AMX, SD1.5's convolutions): float32 108 GFLOP/s, float16 49 to 70, bfloat16 230 to 810. bfloat16 has 8
bits of precision, so it is for who asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lib_async_lowvram.standalone.errors import CannotMake

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"

_WEIGHTS = {torch.conv2d: (1, 2), functional.conv2d: (1, 2), functional.linear: (1, 2)}
_WEIGHTS |= {functional.group_norm: (2, 3), functional.layer_norm: (2, 3)}
"""Places of weight and bias among a function's arguments, of which the first is what it is applied to."""


class Computing(TorchFunctionMode):
    """See the module. `dtype`: of what embeddings give."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._kept: dict[int, tuple[nn.Parameter, torch.Tensor]] | None = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, parameters are converted once. Who enters sees to it that they do not change meanwhile."""
        outermost = self._kept is None
        if outermost:
            self._kept = {}
        try:
            yield
        finally:
            if outermost:
                self._kept = None

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        places = _WEIGHTS.get(func)
        if places is not None and args:
            return func(*(self._like(each, args[0]) if place in places else each for place, each in enumerate(args)), **{
                key: self._like(each, args[0]) if key in ("weight", "bias") else each for key, each in kwargs.items()
            })  # fmt: skip
        found = func(*args, **kwargs)
        return found.to(self.dtype) if func is functional.embedding else found

    def _like(self, weight: Any, values: Any) -> Any:
        if not isinstance(weight, torch.Tensor) or weight.dtype == values.dtype:
            return weight
        if self._kept is None or type(weight) is not nn.Parameter:
            return weight.to(values.dtype)
        _, found = self._kept.get(id(weight), (None, None))
        if found is None or found.dtype != values.dtype:
            found = weight.detach().to(values.dtype)
            self._kept[id(weight)] = (weight, found)  # with itself: nobody else can have its number
        return found


def compute_dtype(asked: str, stored: torch.dtype, on_cpu: bool) -> torch.dtype:
    """For weights that are stored so. "auto": float32 on the CPU, elsewhere as they are stored. `CannotMake` for an unknown name."""
    if asked == AUTO:
        return torch.float32 if on_cpu else stored
    if asked not in NAMES:
        raise CannotMake(f"{asked!r} is no precision: {AUTO}, {', '.join(NAMES)}")
    return NAMES[asked]
