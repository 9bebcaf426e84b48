"""The preview worker: latest wins, nothing half-written, nothing of another job, and the sampling thread never waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.device.use_logger import UseLogger
from lib_async_lowvram.preview import ERRORS_IN_A_ROW, PreviewWorker, to_pixels
from tests.mover.chains import simulated

PATIENCE = 60


class Interrupt(BaseException):
    """As the WebUI interrupts."""


def gone(*_: object) -> None:
    raise RuntimeError("gone")


class Studio:
    """A worker whose decoder can be held, and what it has shown."""

    def __init__(self, streams: Streams) -> None:
        self.shown: list[int] = []
        self.decoding = threading.Semaphore(0)  # one permit per decoding begun
        self.allowed = threading.Semaphore(0)  # one taken per decoding
        self.seen = threading.Semaphore(0)  # one permit per frame shown
        self.fail: BaseException | None = None
        self.worker = PreviewWorker(streams, HostMemory(streams), lambda pixels: int(pixels.flatten()[0]), self._show)

    def _show(self, value: int) -> None:
        self.shown.append(value)
        self.seen.release()

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        self.decoding.release()
        assert self.allowed.acquire(timeout=PATIENCE)
        if self.fail is not None:
            raise self.fail
        return latent[:, :3] / 127.5 - 1  # so that the latent's value is the pixel's

    def submit(self, value: float, key: object = None) -> bool:
        return self.worker.submit(torch.full((1, 4, 2, 2), float(value)), self.decode, key)

    def begun(self) -> None:
        assert self.decoding.acquire(timeout=PATIENCE)

    def allow(self, count: int = 1) -> None:
        self.allowed.release(count)

    def frame(self) -> None:
        assert self.seen.acquire(timeout=PATIENCE)


@pytest.fixture
def studio() -> Iterator[Studio]:
    made = Studio(simulated())
    yield made
    made.allow(100)
    made.worker.close()


def test_a_frame_is_decoded_and_shown(studio: Studio) -> None:
    assert studio.submit(7)
    studio.allow()
    studio.frame()
    assert studio.shown == [7]
    counters = studio.worker.counters
    assert (counters.submitted, counters.decoded, counters.skipped, counters.errors) == (1, 1, 0, 0)
    assert counters.decode_seconds > 0 and counters.submit_seconds > 0


def test_the_latest_wins_and_nobody_waits(studio: Studio) -> None:
    studio.submit(1)
    studio.begun()  # the worker is held inside the first one
    for value in (2, 3, 4):
        assert studio.submit(value)  # returns although nothing moves
    studio.allow(2)
    studio.frame()
    studio.frame()
    assert studio.shown == [1, 4]
    assert studio.worker.counters.skipped == 2


def test_what_the_sampler_writes_later_is_not_shown(studio: Studio) -> None:
    latent = torch.full((1, 4, 2, 2), 5.0)
    studio.worker.submit(latent, studio.decode)
    latent.fill_(250.0)
    studio.allow()
    studio.frame()
    assert studio.shown == [5]


def test_one_frame_per_key_and_job(studio: Studio) -> None:
    assert studio.submit(1, key=(0, 1))
    assert not studio.submit(2, key=(0, 1))
    studio.allow()
    studio.frame()
    assert not studio.submit(3, key=(0, 1))
    assert studio.submit(4, key=(0, 2))
    studio.allow()
    studio.frame()
    studio.worker.new_job()
    assert studio.submit(5, key=(0, 2))
    studio.allow()
    studio.frame()
    assert studio.shown == [1, 4, 5]


def test_no_frame_of_the_job_before(studio: Studio) -> None:
    studio.submit(1)
    studio.begun()
    studio.submit(2)  # waits in the mailbox
    studio.worker.new_job()
    studio.submit(3)
    studio.allow(2)
    studio.frame()
    assert studio.shown == [3]
    assert studio.worker.counters.skipped == 2


def test_errors_drop_frames_and_three_in_a_row_pause_the_job(studio: Studio, caplog: pytest.LogCaptureFixture) -> None:
    studio.fail = torch.cuda.OutOfMemoryError("CUDA out of memory.\nMore lines")
    for number in range(ERRORS_IN_A_ROW):
        assert studio.submit(number)
        studio.allow()
        studio.begun()
        studio.worker.quiesce()
    assert studio.worker.counters.errors == ERRORS_IN_A_ROW
    assert not studio.submit(9)
    assert [record.getMessage() for record in caplog.records] == [
        "previews pause until the next job, after 3 errors in a row: CUDA out of memory."
    ]
    studio.fail = None
    studio.worker.new_job()
    assert studio.submit(10)
    studio.allow()
    studio.frame()
    assert studio.shown == [10]


def test_errors_that_are_not_in_a_row_pause_nothing(studio: Studio) -> None:
    for number in range(2 * ERRORS_IN_A_ROW):
        studio.fail = RuntimeError("odd") if number % 2 else None
        assert studio.submit(number)
        studio.allow()
        studio.begun()
        studio.worker.quiesce()
    assert studio.worker.counters.errors == ERRORS_IN_A_ROW
    assert studio.shown == [0, 2, 4]


def test_quiesce_drops_what_waits_and_waits_for_what_is_decoded(studio: Studio) -> None:
    studio.submit(1)
    studio.begun()
    studio.submit(2)
    done = threading.Event()
    waiting = threading.Thread(target=lambda: (studio.worker.quiesce(), done.set()))
    waiting.start()
    assert not done.is_set()
    studio.allow()
    assert done.wait(PATIENCE)
    waiting.join()
    assert studio.shown == [1]
    assert studio.worker.counters.skipped == 1


def test_close_ends_the_thread_and_nothing_comes_after() -> None:
    studio = Studio(simulated())
    before = threading.active_count()
    studio.submit(1)
    studio.begun()
    assert threading.active_count() == before + 1
    studio.allow()
    studio.worker.close()
    studio.worker.close()
    assert threading.active_count() == before
    assert not studio.submit(2)
    assert studio.shown == []


def test_no_thread_before_the_first_frame() -> None:
    streams = simulated()
    worker = PreviewWorker(streams, HostMemory(streams), lambda pixels: pixels, lambda frame: None)
    assert not any(thread.name == "async-lowvram-preview" for thread in threading.enumerate())
    worker.close()


def test_the_buffer_is_pinned_and_used_again() -> None:
    streams = SimulatedStreams()
    host = HostMemory(streams)
    shapes = []
    seen = threading.Semaphore(0)
    worker = PreviewWorker(streams, host, lambda pixels: tuple(pixels.shape), lambda shape: (shapes.append(shape), seen.release()))
    for size in (8, 4, 8):
        worker.submit(torch.zeros(2, 4, size, size), lambda latent: latent[:, :3])
        assert seen.acquire(timeout=PATIENCE)
        assert host.host_bytes == host.pinned_bytes == 2 * 3 * 8 * 8 * 4
    worker.close()
    assert host.pinned_bytes == 0
    assert shapes == [(2, 8, 8, 3), (2, 4, 4, 3), (2, 8, 8, 3)]
    streams.close()


def test_the_latent_is_read_behind_the_producer() -> None:
    """Under the ordering judge: the worker's stream waits for the producing one."""
    streams = RecordingStreams(simulated())
    order = []
    waits: list[tuple[object, object]] = []
    inner_wait = streams.wait

    def wait(stream: object, event: object) -> None:
        waits.append((stream, event))
        inner_wait(stream, event)

    streams.wait = wait  # type: ignore[method-assign]
    recorded = []
    inner_record = streams.record

    def record(stream: object, *, timing: bool = False) -> object:
        event = inner_record(stream, timing=timing)
        recorded.append((stream, event))
        return event

    streams.record = record  # type: ignore[method-assign]
    seen = threading.Semaphore(0)
    worker = PreviewWorker(streams, HostMemory(streams), lambda pixels: pixels, lambda frame: seen.release())
    worker.submit(torch.zeros(1, 4, 2, 2), lambda latent: (order.append("decode"), latent[:, :3])[1])
    assert seen.acquire(timeout=PATIENCE)
    worker.close()
    producer, written = recorded[0]
    assert producer == streams.current_stream()
    consumer, waited = waits[0]
    assert waited is written and consumer != producer


def test_a_frame_is_read_on_the_host_once_it_has_arrived() -> None:
    """Under the ordering judge: the copy to the host is over before pixels are made of it."""
    streams = RecordingStreams(simulated())
    picture = streams.allocate(3 * 2 * 2 * 4).view(torch.float32).view(1, 3, 2, 2)
    seen = threading.Semaphore(0)
    worker = PreviewWorker(streams, HostMemory(streams), lambda pixels: pixels, lambda frame: seen.release())

    def decode(latent: torch.Tensor) -> torch.Tensor:
        if worker._buffer is None:
            UseLogger(streams).__enter__()  # of this thread's operations, from here on
        else:
            streams.register_host(worker._buffer)
        picture.copy_(latent[:, :3])
        return picture

    for value in (1.0, 2.0, 3.0):
        worker.submit(torch.full((1, 4, 2, 2), value), decode)
        assert seen.acquire(timeout=PATIENCE)
    worker.close()
    assert any("copy_" in operation.what for operation in streams.log)
    streams.check()


def test_pixels_are_rounded_to_the_nearest() -> None:
    exact = torch.linspace(-1.3, 1.3, 3 * 64 * 64, dtype=torch.float64).view(1, 3, 64, 64)
    reference = ((exact.float().double() * 0.5 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    got = to_pixels(exact.float().clone())
    assert got.dtype is torch.uint8 and got.shape == (1, 64, 64, 3) and got.is_contiguous()
    assert float((got.double() - reference).abs().max()) <= 0.5 + 1e-4  # truncating would be off by up to 1
    assert got.min() == 0 and got.max() == 255


def test_nan_is_black() -> None:
    assert to_pixels(torch.full((1, 3, 1, 1), float("nan"))).tolist() == [[[[0, 0, 0]]]]


@pytest.mark.parametrize("value", range(256))
def test_every_level_survives(value: int) -> None:
    assert int(to_pixels(torch.full((1, 3, 1, 1), value / 127.5 - 1)).flatten()[0]) == value


@pytest.mark.parametrize("error", [SystemExit(), KeyboardInterrupt(), Interrupt()], ids=lambda error: type(error).__name__)
def test_what_ends_a_thread_costs_one_frame(studio: Studio, error: BaseException) -> None:
    studio.fail = error
    studio.submit(1)
    studio.allow()
    studio.begun()
    studio.worker.quiesce()
    studio.fail = None
    assert studio.worker.counters.errors == 1
    assert studio.submit(2)
    studio.allow()
    studio.frame()
    assert studio.shown == [2]


def test_a_thread_that_died_is_replaced(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    died = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: died.set())
    with monkeypatch.context() as broken:
        broken.setattr(studio.worker._streams, "aside", gone)
        studio.submit(1)
        assert died.wait(PATIENCE)
        studio.worker._state.thread.join()
    assert studio.submit(2)
    studio.allow()
    studio.frame()
    assert studio.shown == [2]


def test_a_thread_that_cannot_be_started_is_tried_again(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", gone)
        with pytest.raises(RuntimeError, match="gone"):
            studio.submit(1)
    assert studio.submit(2)
    studio.allow()
    studio.frame()
    assert studio.shown == [2]
