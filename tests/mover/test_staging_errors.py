"""What goes wrong on the staging thread reaches who waits for it, and nobody waits longer than for the copy to be enqueued."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.staging import Progress, Staged
from lib_async_lowvram.device.streams import Event
from tests.mover.chains import LEAF_BYTES, attached, pair, same, simulated
from tests.mover.staging_rig import SLOW, Stop, finished, staged

pytestmark = pytest.mark.usefixtures("the_limit_holds")


# -- errors ------------------------------------------------------------------------------------------------------------
@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, method: str, number: int, error: BaseException) -> Iterator[None]:
    """The `number`th call of a method on the staging thread raises."""
    original, calls = getattr(SimulatedStreams, method), [0]

    def stand_in(self: SimulatedStreams, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "async-lowvram-staging":
            calls[0] += 1
            if calls[0] == number:
                raise error
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SimulatedStreams, method, stand_in)
        yield
    assert calls[0] >= number, "the thread does not come by here"


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("method", ["copy_on_host", "copy", "record", "outwait"])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), MemoryError("no"), Stop()])
def test_what_goes_wrong_on_the_thread_reaches_who_waits(
    error: BaseException, method: str, number: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = simulated(**SLOW)
    net, twin = pair()
    mover = attached(net, streams, budget, passes=1, pinned_limit_bytes=LEAF_BYTES)
    met = []
    with failing(monkeypatch, method, number, error):
        for _ in range(4):
            try:
                same(net, twin, streams)
            except (type(error)) as raised:
                met.append(raised)
    assert met in ([error], []), "raised once, or of a copy that nobody wanted in the end"
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("number", range(8))
def test_a_copy_that_fails_on_the_device(number: int) -> None:
    streams = simulated(**SLOW)
    net, twin = pair()
    mover = attached(net, streams, pinned_limit_bytes=LEAF_BYTES)
    first = streams.onload_stream.copies
    streams.fail_copy = lambda copies: RuntimeError("link down") if copies == first + number else None
    failures = 0
    for _ in range(3):
        try:
            same(net, twin, streams)
        except RuntimeError as error:
            assert "link down" in str(error)
            failures += 1
    streams.fail_copy = None
    assert failures <= 1
    with suppress(RuntimeError):
        mover.drain()
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_no_thread_to_spare(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "async-lowvram-staging":
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        net, twin, mover, streams = staged(LEAF_BYTES)
        same(net, twin, streams)
        assert mover.status()["tier"] == "pageable" and "no thread for staged copies" in caplog.text
    mover.drain()
    same(net, twin, streams)
    assert mover.status()["tier"] == "staged"
    finished(mover, streams, net, twin)


# -- waits -------------------------------------------------------------------------------------------------------------
def test_the_host_waits_only_until_the_copy_is_enqueued() -> None:
    """And not for the copy: the thread that runs the network goes on launching (here: it comes as far as its own stream's wait)."""
    order: list[str] = []
    gate = threading.Event()

    class Watched(SimulatedStreams):
        def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            gate.wait(60)
            super().copy_on_host(destination, source)

        def wait(self, stream: Any, event: Event) -> None:
            if stream not in (self.onload_stream, self.offload_stream):
                order.append("waits for a copy")
            super().wait(stream, event)

    streams = simulated(Watched)
    gate.set()
    net, twin, mover, streams = staged(2 * LEAF_BYTES, streams, passes=3)
    mover.drain()
    before = mover.status()["staging_waits"]
    gate.clear()
    order.clear()
    done = threading.Thread(target=lambda: same(net, twin, streams))
    done.start()
    while mover._networks["net"].counters.staging_waits == before:
        assert done.is_alive()
    assert order == []  # held up before its stream was given anything to wait for
    gate.set()
    done.join()
    assert mover.status()["staging_waits"] > before
    finished(mover, streams, net, twin)


def test_what_is_queued_is_let_go_of_before_its_place_is_given_away_or_its_master_read_anew() -> None:
    gate = threading.Event()

    class Gated(SimulatedStreams):
        def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            assert gate.wait(60)
            super().copy_on_host(destination, source)

    gate.set()
    net, twin, mover, streams = staged(LEAF_BYTES, RecordingStreams(simulated(Gated)))
    mover.drain()
    gate.clear()
    with torch.no_grad():
        mover.prepare("net")
    network = mover._networks["net"]
    streaming, (first, second) = network.streaming, network.contents.units[:2]
    assert first.copied.progress is Progress.RUNNING or not first.copied.enqueued
    job = second.copied
    assert job.progress is Progress.QUEUED  # behind the first one, which the gate holds up
    streaming._slots.vacate(second, streams.current_stream())
    assert job.progress is Progress.OVER and not isinstance(second.copied, Staged)
    streaming._slots.onload(second)
    job = second.copied
    assert job.progress is Progress.QUEUED
    streaming._transfers.onload(second)  # fetched again: a change was seen
    assert job.progress is Progress.OVER and second.copied.progress is Progress.QUEUED
    second.pending = 1
    gate.set()
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)
