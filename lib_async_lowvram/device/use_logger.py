"""Tells the recorder what the model's computing reads and writes.

Problem: the ordering judge sees copies and events because they pass through `Streams`, but the uses of weights are plain
aten operations. `UseLogger` is the `TorchDispatchMode` a test runs the model under; each operation's arguments that lie in
device blocks or known host blocks are logged as uses.

Results an operation newly makes are not logged: they cannot lie in our blocks, as our blocks are not free memory. Results
that share an argument's memory are covered by the argument.

Thread: whichever runs the model; the use counts as on that thread's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils._python_dispatch import TorchDispatchMode

from .op_access import OpAccess

if TYPE_CHECKING:
    from .recorder import RecordingStreams


class UseLogger(TorchDispatchMode):
    """`with UseLogger(recording_streams): model(x)`."""

    def __init__(self, streams: RecordingStreams) -> None:
        super().__init__()
        self._streams = streams
        self._access = OpAccess()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Newer torch asks; True would import torch._dynamo at the first operation and cost a detour at each."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        definite, views = self._access.split(func, args, kwargs)
        self._streams.use(
            reads=[tensor for tensor, writes in definite if not writes],
            writes=[tensor for tensor, writes in definite if writes],
            what=str(func),
            blocking=not _non_blocking(func, args, kwargs),
        )
        result = func(*args, **kwargs)
        self._streams.use(reads=self._access.read_by_view(views, result), what=str(func))
        return result


def _non_blocking(func: Any, args: tuple, kwargs: dict) -> bool:
    if "non_blocking" in kwargs:
        return bool(kwargs["non_blocking"])
    names = [argument.name for argument in func._schema.arguments[: len(args)]] if hasattr(func, "_schema") else []
    return "non_blocking" in names and bool(args[names.index("non_blocking")])
