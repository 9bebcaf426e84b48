"""`Banded`: what a module is called with in the place of a tensor, when the picture is too large to be computed as one.

Problem: weights travel to the device in the modules' forward hooks, LoRA patches `forward`, other extensions replace nonlinearities: the
modules must be called, as they are, once each and in their own order, and every tile must be computed in that one call, or weights
would have to come once per tile. So each module is called once, with an object that is a tensor to everybody who asks - shape, dtype,
device - and whose operations are ours (`__torch_function__`): a convolution loops over bands of rows then and there, while its weights
are on the device; a group norm reads its weights and the whole picture's statistics; everything between is written down and
evaluated per band (`rows`). Each unit is streamed once, in the order that was learned, whatever the picture's size.

What it does is what torch does, operation by operation: the same functions on the same values, but for the statistics' order of
summation (`norm_statistics`) and for what a library does differently with fewer rows. An operation that is not in the table raises
`Untileable`; whoever called the modules falls back as a whole, and says so.

Gradients are not supported. On the thread that computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from lib_async_lowvram.large.norm_statistics import opmath
from lib_async_lowvram.large.rows import Enlarged, Expression, Kept, Normalised, Padded, Pointwise, Untileable
from lib_async_lowvram.large.space import Space, Stored


class Banded(torch.Tensor):
    """A picture as an expression over stored ones. Attributes: expression, space."""

    @staticmethod
    def __new__(cls, expression: Expression, space: Space) -> Banded:
        return torch.Tensor._make_wrapper_subclass(cls, expression.shape, dtype=expression.dtype, device=space.device)

    def __init__(self, expression: Expression, space: Space) -> None:
        self.expression, self.space = expression, space

    def __repr__(self) -> str:
        return f"<Banded {tuple(self.expression.shape)} {self.expression.dtype}>"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        handler = _TABLE.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if func in _ASKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise Untileable(f"{getattr(func, '__qualname__', func)} is not known to be computable in bands")

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise Untileable(f"{func} is not known to be computable in bands")

    def store(self) -> Stored:
        """Computed and kept, unless it is already."""
        if not isinstance(self.expression, Kept):
            self.expression = Kept(materialised(self.expression, self.space))
        return self.expression.stored

    def whole(self) -> torch.Tensor:
        """As one tensor on the device."""
        return self.store().whole()


def banded(x: torch.Tensor, space: Space) -> Banded:
    """`x`, a whole picture on the device. Held as it is, and not counted as stored: it is the caller's."""
    if isinstance(x, Banded):
        return x
    stored = Stored(space, x, tuple(x.shape), on_host=False)
    stored.moments.add(x)
    return Banded(Kept(stored), space)


def materialised(expression: Expression, space: Space) -> Stored:
    """Every row of it, computed once."""
    height = expression.shape[2]
    stored = space.store(expression.shape, expression.dtype)
    rows = space.rows(0, expression.live_bytes + expression.row_bytes, height)
    for top in range(0, height, rows):
        stored.write(top, expression.rows(top, min(height, top + rows), {}))
    return stored


# -- operations ------------------------------------------------------------------------------------------------------------
def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, (int, float)) else (value[0], value[-1])


def _conv2d(
    input: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Banded:
    if isinstance(padding, str) or not isinstance(input, Banded):
        raise Untileable("a convolution of this kind")
    space, (down, across), (above, beside), spread = input.space, _pair(stride), _pair(padding), _pair(dilation)
    source = Padded(input.expression, 0, 0, above, above) if above else input.expression
    reach = spread[0] * (weight.shape[2] - 1) + 1
    height = (source.shape[2] - reach) // down + 1
    if height < 1:
        raise Untileable("a picture smaller than the convolution's kernel")

    def rows(top: int, bottom: int) -> torch.Tensor:
        x = source.rows(top * down, (bottom - 1) * down + reach, {})
        return functional.conv2d(x, weight, bias, (down, across), (0, beside), spread, groups)

    first = rows(0, 1)  # which dtype, and how wide
    stored = space.store((*first.shape[:2], height, first.shape[3]), first.dtype)
    own = first.numel() * first.element_size()
    del first
    count = space.rows(source.live_bytes * max(0, reach - down), source.live_bytes * down + own, height)
    for top in range(0, height, count):
        stored.write(top, rows(top, min(height, top + count)))
    return Banded(Kept(stored), space)


def _group_norm(
    input: Banded, num_groups: int, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> Banded:
    stored = input.store()
    # torch's own norm of a corner says which dtype it gives (autocast, float32 weights), and refuses what it would refuse.
    corner = functional.group_norm(stored.rows(0, 1)[:, :, :, :2].contiguous(), num_groups, weight, bias, eps)
    statistics = stored.moments.groups(num_groups)
    scale, shift = statistics.scale_and_shift(stored.shape[1], weight, bias, eps, opmath(stored.dtype))
    return Banded(Normalised(input.expression, scale, shift, corner.dtype), input.space)


class _Hole:
    """Where a picture's rows go among the arguments of a pointwise operation."""


def _argument(value: Any, like: Banded) -> Any:
    """Another argument of a pointwise operation on `like`, that may be kept beyond the call: weights are copied."""
    if not isinstance(value, torch.Tensor) or isinstance(value, Banded):
        return value
    if value.dim() == 4 and value.shape[2:] == like.expression.shape[2:] and like.expression.shape[2:] != (1, 1):
        return banded(value, like.space)
    if value.dim() == 0 or (value.dim() >= 3 and value.shape[-2:] == (1, 1)):
        return value.detach().clone()
    raise Untileable(f"a tensor of {tuple(value.shape)} beside a picture of {tuple(like.expression.shape)}")


def _pointwise(function: Callable) -> Callable[..., Banded]:
    """`function` of pictures, numbers, and tensors that hold one value per channel."""

    def handler(*args: Any, **kwargs: Any) -> Banded:
        if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
            raise Untileable("an operation with tensors for keywords")
        like = next(arg for arg in args if isinstance(arg, Banded))
        given = [_argument(arg, like) for arg in args]
        form = [_Hole if isinstance(arg, Banded) else arg for arg in given]

        def evaluate(*rows: torch.Tensor) -> torch.Tensor:
            following = iter(rows)
            return function(*(next(following) if arg is _Hole else arg for arg in form), **kwargs)

        return Banded(Pointwise(evaluate, *(arg.expression for arg in given if isinstance(arg, Banded))), like.space)

    return handler


def _in_place(function: Callable) -> Callable[..., Banded]:
    """The picture becomes the result. Others made of it before keep what it was: nothing here is a view of anything."""
    handler = _pointwise(function)

    def change(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Banded):
            raise Untileable("a picture written into a tensor")
        result = handler(self, *args, **kwargs).expression
        if (result.shape, result.dtype) != (self.expression.shape, self.expression.dtype):
            raise Untileable("an operation in place that changes the picture's shape or type")
        self.expression = result
        return self

    return change


def _silu(input: Banded, inplace: bool = False) -> Banded:
    return (_in_place if inplace else _pointwise)(functional.silu)(input)


def _dropout(input: Banded, p: float = 0.5, training: bool = True, inplace: bool = False) -> Banded:
    if training and p:
        raise Untileable("dropout")
    return input


def _interpolate(input: Banded, size: Any = None, scale_factor: Any = None, mode: str = "nearest", **more: Any) -> Banded:
    down, across = _pair(scale_factor if scale_factor is not None else 0)
    if size is not None or mode != "nearest" or down != across or down < 1 or int(down) != down or any(more.values()):
        raise Untileable("resampling of this kind")
    return Banded(Enlarged(input.expression, int(down)), input.space)


def _pad(input: Banded, pad: Any, mode: str = "constant", value: float | None = None) -> Banded:
    sides = [*pad, 0, 0][:4] if len(pad) <= 4 else pad
    if mode not in ("constant", "circular") or len(sides) != 4:
        raise Untileable("a border of this kind")
    return Banded(Padded(input.expression, *sides, value=None if mode == "circular" else float(value or 0.0)), input.space)


def _same(input: Banded, *args: Any, **kwargs: Any) -> Banded:
    return input


def _cast(method: Callable) -> Callable[..., Banded]:
    """`to` and its like. The device stays; asked for another one, the picture is not the one to go."""

    def handler(input: Banded, *args: Any, **kwargs: Any) -> Banded:
        moved = method(torch.empty(0, dtype=input.dtype, device=input.device), *args, **kwargs)
        if moved.device != input.device and moved.device.type != input.device.type:
            raise Untileable(f"a picture sent to {moved.device}")
        return input if moved.dtype == input.dtype else _pointwise(lambda x: x.to(moved.dtype))(input)

    return handler


def _table() -> dict[Any, Callable]:
    tensor, found = torch.Tensor, {}
    found[functional.conv2d] = found[torch.conv2d] = _conv2d
    found[functional.group_norm] = _group_norm
    found[functional.silu], found[functional.dropout] = _silu, _dropout
    found[functional.interpolate], found[functional.pad] = _interpolate, _pad
    for function in (torch.sigmoid, torch.tanh, torch.relu, torch.add, torch.sub, torch.mul, torch.div, torch.neg):
        found[function] = _pointwise(function)
    for name in ("sigmoid", "tanh", "add", "sub", "mul", "div", "neg", "clamp"):
        found[getattr(tensor, name)] = _pointwise(getattr(tensor, name))
    for name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg"):
        found[getattr(tensor, f"__{name}__")] = _pointwise(getattr(tensor, f"__{name}__"))
    for name in ("add", "sub", "mul", "div"):
        found[getattr(tensor, f"{name}_")] = _in_place(getattr(tensor, name))
    for name in ("add", "sub", "mul", "truediv"):
        found[getattr(tensor, f"__i{name}__")] = _in_place(getattr(tensor, f"__{name}__"))
    for name in ("to", "float", "half", "bfloat16", "double", "type"):
        found[getattr(tensor, name)] = _cast(getattr(tensor, name))
    for name in ("contiguous", "detach", "clone"):
        found[getattr(tensor, name)] = _same
    return found


def _asks() -> set[Any]:
    """What may be asked of a picture without computing it."""
    tensor = torch.Tensor
    properties = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
    properties += ("is_cuda", "is_sparse", "is_quantized", "is_meta")
    methods = ("size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "__len__")
    found = {getattr(tensor, name).__get__ for name in properties} | {getattr(tensor, name) for name in methods}
    return found | {torch.is_floating_point, torch.numel, torch.is_complex}


_TABLE = _table()
_ASKS = _asks()
