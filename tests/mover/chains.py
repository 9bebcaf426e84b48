"""A small chain of equal leaves, for tests that need to know exactly what is where; and a device that lets go when waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig
from lib_async_lowvram.device.copy_engine import CopyHold
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Event, Stream, Streams
from lib_async_lowvram.device.use_logger import UseLogger

LEAF_BYTES = 256 * 8 * 4
X = torch.ones(1, 8)


class Leaf(nn.Module):
    """8 KB of weights. `inside`, if set, is called with the leaf in the middle of its next forward, and forgotten."""

    def __init__(self, rows: int = 256) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 8))
        self.register_parameter("bias", None)
        self.inside: Callable[[Leaf], None] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside, self.inside = self.inside, None
        if inside is not None:
            with torch.no_grad():
                inside(self)
        x = x + torch.tanh(x @ self.weight.float().t()).sum(-1, keepdim=True)
        return x if self.bias is None else x + self.bias


class Chain(nn.Module):
    """Runs its leaves in `order`."""

    def __init__(self, leaves: int = 6, order: list[int] | None = None, rows: int = 256) -> None:
        super().__init__()
        self.leaves = nn.ModuleList(Leaf(rows) for _ in range(leaves))
        self.order = order or list(range(leaves))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in self.order:
            x = self.leaves[place](x)
        return x


def pair(make: Callable[[], Any] = Chain) -> tuple[Any, Any]:
    """Two equal modules: one to be managed, one to compare with."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(make().eval())
    return made[0], made[1]


class ObligingStreams(SimulatedStreams):
    """While `hold` is set, whoever waits for a copy gets it, and nobody else: held copies that nobody waits for stay undone."""

    hold: CopyHold | None = None

    def _oblige(self) -> None:
        if self.hold is not None:
            self.hold.let_pass(1 << 30)

    def synchronize(self, event: Event) -> None:
        self._oblige()
        super().synchronize(event)

    def outwait(self, event: Event) -> None:
        self._oblige()
        super().outwait(event)

    def wait(self, stream: Stream, event: Event) -> None:
        if stream not in (self.onload_stream, self.offload_stream) and not self.done(event):
            self._oblige()
        super().wait(stream, event)


OPEN: list[SimulatedStreams] = []
"""Closed after each test (conftest.py)."""


def simulated(kind: type[SimulatedStreams] = SimulatedStreams, **settings: Any) -> SimulatedStreams:
    """A device with an endless link unless told otherwise."""
    streams = kind(**{"capacity_bytes": 64 << 20, "bandwidth": float("inf"), "latency": 0.0, **settings})
    OPEN.append(streams)
    return streams


def recorded(**settings: Any) -> RecordingStreams:
    """The same under the ordering judge."""
    return RecordingStreams(simulated(**settings))


def attached(
    network: nn.Module | NetworkSpec, streams: Streams, budget: int = 1, run: nn.Module | None = None, passes: int = 2, **config: Any
) -> AsyncModelMover:
    """A mover with one network "net" that has run `passes` passes. The least budget unless told otherwise."""
    settings = {"budget_bytes": budget, "small_leaf_bytes": 0, "check_placement": True, **config}
    mover = AsyncModelMover(OffloadConfig(**settings), streams)
    mover.attach({"net": network})
    for _ in range(passes):
        call(run or network, streams)
    return mover


@contextmanager
def judged(streams: Streams) -> Iterator[None]:
    """Uses are logged, where the streams record. The judges' modes end here, even where a pass stays open or was interrupted."""
    depth = len(_get_current_dispatch_mode_stack())
    try:
        if isinstance(streams, RecordingStreams):
            UseLogger(streams).__enter__()
        with torch.no_grad():
            yield
    finally:
        while len(_get_current_dispatch_mode_stack()) > depth:
            _pop_mode()


def call(network: nn.Module, streams: Streams, x: torch.Tensor = X) -> torch.Tensor:
    """One pass without gradients, judged."""
    with judged(streams):
        return network(x)


def same(network: nn.Module, twin: nn.Module, streams: Streams) -> None:
    """One pass of both gives the same, bit for bit."""
    with torch.no_grad():
        expected = twin(X)
    got = call(network, streams)
    assert torch.equal(got, expected)


def handed_over(work: Callable[[], Any], streams: RecordingStreams) -> Any:
    """As `on_thread`; and each thread goes on from what the other has waited for on the host, as a start and a join do."""
    before, after = streams.known(), {}

    def there() -> Any:
        streams.learn(before)
        try:
            return work()
        finally:
            after.update(streams.known())

    try:
        return on_thread(there)
    finally:
        streams.learn(after)


def on_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, done on another thread while this one waits. A judge is stricter here than the machine is:
    it takes the two threads for strangers. See `handed_over`."""
    outcome: list[Any] = []

    def go() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # handed on below
            outcome.append((None, error))

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
