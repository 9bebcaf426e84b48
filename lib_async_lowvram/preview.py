"""`PreviewWorker`: live previews decoded by a thread of their own, on a stream of their own.

Problem: who samples must not wait for a preview - not for its decoding, not for its copy to the host - and must never show a
half-written latent, nor a frame of the job before. Decoding takes as long as it takes; meanwhile newer latents arrive.

Solution: a mailbox with one place, in which the newest latent replaces the one before (latest wins). `submit` copies the latent
on the producing stream, so that whoever goes on with it may write into it, and records an event there; the worker makes its own
stream wait for that. The copy is held until its frame is on the host, so its memory is not handed out before it was read. The
frame goes into a pinned buffer that is used again; only the worker waits for it.

Invariants: `submit` never blocks on the worker (I3). One frame per (job, key). A frame is shown only while the job it was
submitted in still runs: jobs are counted (`new_job`), and the count is compared under the lock under which frames are shown. An
error drops its frame; three in a row end previews for that job, with one line in the log. No thread before the first frame (I7).

Called: `submit` on the sampling thread; `new_job`, `quiesce`, `close` on any; `decode`, `render` and `show` run on the worker.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.streams import Event, Streams
from lib_async_lowvram.log import logger

ERRORS_IN_A_ROW = 3
"""After so many, previews pause until the next job."""

RECENT = 8
"""Frames whose times are kept, for a timeline."""


class NoRoom(Exception):
    """Raised by a decoder that would need more device memory than there is: the frame is skipped, which is no error."""


Decode = Callable[[torch.Tensor], torch.Tensor]
"""Latents [N, C, h, w] -> pictures [N, 3, H, W], values from -1 to 1, on the device."""


@dataclass
class PreviewCounters:
    """Since the worker was made. `skipped`: replaced by a newer latent before it was decoded, of a job that had ended, or no room.
    `decode_seconds`: on the worker, waits included. `submit_seconds`: on the sampling thread."""

    decoded: int = 0
    skipped: int = 0
    errors: int = 0
    submitted: int = 0
    decode_seconds: float = 0.0
    submit_seconds: float = 0.0


@dataclass
class _Request:
    latent: torch.Tensor
    written: Event
    decode: Decode
    job: int


@dataclass
class _State:
    """Under the condition."""

    waiting: _Request | None = None
    working: bool = False
    stopping: bool = False
    job: int = 0
    last_key: Hashable = None
    paused: bool = False
    failures: int = 0
    thread: threading.Thread | None = field(default=None)


class PreviewWorker:
    """See the module. `render(pixels)`: uint8 [N, H, W, 3] on the host -> whatever `show` takes; it may not keep `pixels`."""

    def __init__(
        self, streams: Streams, host: HostMemory, render: Callable[[torch.Tensor], Any], show: Callable[[Any], None]
    ) -> None:
        self.counters = PreviewCounters()
        self._streams = streams
        self._host = host
        self._render = render
        self._show = show
        self._state = _State()
        self._changed = threading.Condition()
        self._buffer: torch.Tensor | None = None
        self._recent: deque[tuple[Event, Event]] = deque(maxlen=RECENT)

    # -- the sampling thread -------------------------------------------------------------------------------------------
    def submit(self, latent: torch.Tensor, decode: Decode, key: Hashable = None) -> bool:
        """Have `latent` decoded by `decode` when the worker gets there, unless a newer one comes first. False when nothing
        will come of it: a second one for the same `key` (not None) in this job, previews paused, or closed."""
        started = time.perf_counter()
        with self._changed:
            state = self._state
            if state.stopping or state.paused or (key is not None and key == state.last_key):
                return False
            state.last_key = key
        with torch.no_grad():
            copy = latent.detach().clone()
        request = _Request(copy, self._streams.record(self._streams.current_stream()), decode, state.job)
        with self._changed:
            self.counters.submitted += 1
            self._replace(request)
            if state.thread is None or not state.thread.is_alive():  # it may have died, of a device that is gone, say
                thread = threading.Thread(target=self._run, name="async-lowvram-preview", daemon=True)
                thread.start()
                state.thread = thread
            self._changed.notify_all()
        self.counters.submit_seconds += time.perf_counter() - started
        return True

    def _replace(self, request: _Request | None) -> None:
        if self._state.waiting is not None:
            self.counters.skipped += 1
        self._state.waiting = request

    @property
    def recent(self) -> list[tuple[Event, Event]]:
        """Timing events around the newest frames, oldest first; from any thread."""
        return list(self._recent)

    # -- jobs and the end ----------------------------------------------------------------------------------------------
    def new_job(self) -> None:
        """A job begins, or has ended: no frame submitted before is shown from here on."""
        with self._changed:
            state = self._state
            state.job += 1
            state.last_key, state.paused, state.failures = None, False, 0
            self._replace(None)

    def refused(self, error: Exception) -> None:
        """A frame could not even be submitted: counted as an error of this job."""
        with self._changed:
            job = self._state.job
        self._failed(job, error)

    def quiesce(self) -> None:
        """Drop what waits, and block until the worker touches nothing of the model's any more."""
        with self._changed:
            self._replace(None)
            if threading.current_thread() is not self._state.thread:
                self._changed.wait_for(lambda: not self._state.working)

    def close(self) -> None:
        """Quiesce and stop the thread. Idempotent."""
        with self._changed:
            state = self._state
            state.stopping = True
            state.job += 1
            self._replace(None)
            self._changed.notify_all()
            thread = state.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._buffer = None

    # -- the worker ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        with self._streams.aside(), torch.no_grad():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._state.stopping or self._state.waiting is not None)
                    request, self._state.waiting = self._state.waiting, None
                    if request is None:
                        return
                    self._state.working = True
                try:
                    self._one(request)
                finally:
                    del request
                    with self._changed:
                        self._state.working = False
                        self._changed.notify_all()

    def _one(self, request: _Request) -> None:
        started = time.perf_counter()
        try:
            shown = self._render(self._pixels(request))
        except NoRoom:
            with self._changed:
                self.counters.skipped += 1
            return
        except BaseException as error:  # whatever a decoder raises costs one frame, never the job; nobody interrupts this thread
            self._failed(request.job, error)
            return
        with self._changed:
            if request.job != self._state.job:
                self.counters.skipped += 1
                return
            self._state.failures = 0
            self._show(shown)
            self.counters.decoded += 1
        self.counters.decode_seconds += time.perf_counter() - started

    def _failed(self, job: int, error: BaseException) -> None:
        with self._changed:
            state = self._state
            self.counters.errors += 1
            if job != state.job:
                return
            state.failures += 1
            if state.failures >= ERRORS_IN_A_ROW and not state.paused:
                state.paused = True
                text = str(error).splitlines()[0] if str(error) else type(error).__name__
                logger.warning("previews pause until the next job, after %d errors in a row: %s", state.failures, text)

    def _pixels(self, request: _Request) -> torch.Tensor:
        """uint8 [N, H, W, 3] on the host, in the buffer that the next frame will use again."""
        streams = self._streams
        streams.wait(streams.current_stream(), request.written)
        started = streams.record(streams.current_stream(), timing=True)
        try:
            decoded = request.decode(request.latent)
            staged = self._staging(decoded.shape)
            staged.copy_(decoded, non_blocking=True)
        finally:
            # Also after an error: what was launched before it may still read the latent, which is let go of next.
            ended = streams.record(streams.current_stream(), timing=True)
            streams.synchronize(ended)
        self._recent.append((started, ended))
        return to_pixels(staged)

    def _staging(self, shape: torch.Size) -> torch.Tensor:
        nbytes = 4 * shape.numel()
        if self._buffer is None or self._buffer.numel() < nbytes:
            self._buffer = self._host.allocate(nbytes)
            self._host.pin(self._buffer)
        return self._buffer[:nbytes].view(torch.float32).view(shape)


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] float32 on the host, values from -1 to 1 (beyond: clamped), overwritten -> [N, H, W, 3] uint8, rounded to
    the nearest; stock truncates, which darkens previews by half a step. NaN becomes 0."""
    pictures.mul_(127.5).add_(127.5).nan_to_num_(0.0).clamp_(0.0, 255.0).round_()
    return pictures.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
