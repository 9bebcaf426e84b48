"""What memory one aten operation reads and writes, read off its schema.

Problem: both judges (placement checker, recorder) watch operations through a `TorchDispatchMode`, and must not mistake
an operation that only makes a view (`t`, `view`, `detach`) or only looks at shape and dtype (`empty_like`) for one that
touches memory: the mover itself makes such views while publishing. Some operations (`reshape`, `to`, `contiguous`) are
views or copies depending on their arguments; what they did is known only after they ran.

Invariant: what is reported as definite is touched whenever the operation runs at all. Called inside
`__torch_dispatch__`, on whatever thread runs the operation; launches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

METADATA_ONLY = frozenset(
    f"aten::{name}"
    for name in (
        "empty_like new_empty new_empty_strided new_zeros new_ones new_full zeros_like ones_like full_like rand_like "
        "randn_like randint_like set_ is_pinned is_same_size result_type is_floating_point is_complex is_signed "
        "_has_compatible_shallow_copy_type sym_size sym_stride sym_numel sym_storage_offset size stride requires_grad_ "
        # `_unsafe_view` shares its argument's memory without saying so in its schema.
        "_unsafe_view"
    ).split()
)
"""Operations that take a tensor for its shape, dtype or storage only."""

_READ, _WRITE, _VIEW = 0, 1, 2


def byte_range(tensor: torch.Tensor) -> tuple[int, int] | None:
    """[start, end) of the bytes `tensor` itself spans (not its whole storage); None when it has no memory of its own:
    empty, meta, sparse, or a wrapper subclass."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.numel() == 0:
        return None
    try:
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # wrapper subclasses: their inner tensors come by on their own
        return None
    if not start:
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _storage_address(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins, even if the tensor itself is empty; 0 when it has none."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # wrapper subclasses
        return 0


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in an argument or result: itself, or inside lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


@contextmanager
def without_dispatch_modes() -> Iterator[None]:
    """Run a block that no `TorchDispatchMode` of this thread sees: the mover's own copies are not the model's uses."""
    if not torch._C._len_torch_dispatch_stack():
        yield
        return
    with _disable_current_modes():
        yield


class OpAccess:
    """Sorts an operation's tensor arguments. Keeps what it learned of each schema; one per judge."""

    def __init__(self) -> None:
        self._plans: dict[Any, tuple[tuple[int, ...], dict[str, int]] | None] = {}

    def split(self, func: Any, args: tuple, kwargs: dict) -> tuple[list[tuple[torch.Tensor, bool]], list[torch.Tensor]]:
        """(definite, views): definite accesses as (tensor, writes), and arguments whose memory may merely be shared
        with the result (see `read_by_view`)."""
        try:
            plan = self._plans[func]
        except KeyError:
            plan = self._plans[func] = _plan(func)
        definite: list[tuple[torch.Tensor, bool]] = []
        views: list[torch.Tensor] = []
        if plan is None:
            return definite, views
        positional, named = plan
        for index, value in enumerate(args):
            self._sort(value, positional[index] if index < len(positional) else _READ, definite, views)
        for name, value in kwargs.items():
            self._sort(value, named.get(name, _READ), definite, views)
        return definite, views

    @staticmethod
    def _sort(value: Any, mode: int, definite: list, views: list) -> None:
        for tensor in tensors_in(value):
            if mode == _VIEW:
                views.append(tensor)
            else:
                definite.append((tensor, mode == _WRITE))

    @staticmethod
    def read_by_view(views: list[torch.Tensor], result: Any) -> list[torch.Tensor]:
        """Of `views`, those that the operation turned out to copy: no result shares their storage."""
        if not views:
            return views
        shared = {_storage_address(out) for out in tensors_in(result)}
        return [view for view in views if byte_range(view) is not None and _storage_address(view) not in shared]


def _plan(func: Any) -> tuple[tuple[int, ...], dict[str, int]] | None:
    schema = getattr(func, "_schema", None)
    if schema is None:  # a higher-order operator: everything it is given counts as read
        return (), {}
    if schema.name in METADATA_ONLY:
        return None
    modes = []
    for argument in schema.arguments:
        alias = argument.alias_info
        modes.append(_READ if alias is None else _WRITE if alias.is_write else _VIEW)
    return tuple(modes), {argument.name: mode for argument, mode in zip(schema.arguments, modes, strict=True)}
