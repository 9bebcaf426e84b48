"""What `doctor` measures: pinning, the link both ways, launches and waits. A few seconds, little memory, nothing kept.

Problem: the plan of a network rests on what this machine's link does, and whether copies can run beside computing rests on
pinned memory; neither can be read off a data sheet. Everything goes through `Streams`, as the mover's own copies do, so the
simulated device is measured by the same code.

Called by `doctor` on the main thread, with no model anywhere. Seconds are medians over repeats, by the host's clock.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.streams import Event, Streams

PROBE_BYTES = 32 << 20
"""Of one copy: as large as the largest layers, so that what a copy costs beside its bytes does not show."""

LEAST_PROBE_BYTES = 1 << 20

REPEATS, LAUNCHES = 7, 50


def probe(streams: Streams) -> dict[str, Any]:
    """All measurements; what could not be had is None, with the reason in `problems`."""
    problems: list[str] = []
    host = HostMemory(streams)
    nbytes = min(PROBE_BYTES, streams.free_memory() // 4, host.pinned_limit_bytes // 2)
    link: dict[str, Any] | None = None
    pinned = False
    if nbytes < LEAST_PROBE_BYTES:
        problems.append(f"too little memory is free to measure the link ({streams.free_memory() >> 20} MB on the device)")
    else:
        try:
            link, pinned = _link(streams, host, nbytes)
        except torch.cuda.OutOfMemoryError as error:
            problems.append(f"the link could not be measured: {str(error).splitlines()[0]}")
    return {
        "probe_bytes": nbytes,
        "pinning_works": pinned if link is not None else None,
        "pinned_limit_bytes": host.pinned_limit_bytes,
        "bandwidth_bytes_per_s": link,
        **_launches(streams),
        "problems": problems,
    }


def _link(streams: Streams, host: HostMemory, nbytes: int) -> tuple[dict[str, Any], bool]:
    """Bytes per second of each kind of copy, and whether memory can be pinned."""
    block = streams.allocate(nbytes)
    try:
        pageable, locked = host.allocate(nbytes), host.allocate(nbytes)
        pinned = host.pin(locked)
        found: dict[str, Any] = {}
        for name, memory, possible in (("pinned", locked, pinned), ("pageable", pageable, True)):
            memory.fill_(1)  # pages that were never written to are not there yet
            for way, destination, source, stream in (
                ("to_device", block, memory, streams.onload_stream),
                ("to_host", memory, block, streams.offload_stream),
            ):
                seconds = _seconds(streams, lambda d=destination, s=source, t=stream: _copied(streams, d, s, t)) if possible else None
                found[f"{name}_{way}"] = nbytes / seconds if seconds else None
        host.unpin(locked)
        return found, pinned
    finally:
        streams.free(block, (streams.record(streams.current_stream()),))


def _copied(streams: Streams, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> Event:
    streams.copy(destination, source, stream)
    return streams.record(stream)


def _seconds(streams: Streams, launch: Callable[[], Event], repeats: int = REPEATS) -> float:
    """From launching something to knowing that it is done."""
    streams.synchronize(launch())  # the first of its kind pays for what the others find ready
    taken = []
    for _ in range(repeats):
        begin = perf_counter()
        streams.synchronize(launch())
        taken.append(perf_counter() - begin)
    return median(taken)


def _launches(streams: Streams) -> dict[str, float]:
    """Host time of a kernel's launch, of recording an event and letting another stream wait for it, and of one small kernel
    from its launch until the host knows that it is done; seconds."""
    small = torch.zeros(1024, device=streams.device)

    def kernel() -> Event:
        small.add_(1)
        return streams.record(streams.current_stream())

    round_trip = _seconds(streams, kernel, LAUNCHES)
    launches, waits = [], []
    for _ in range(LAUNCHES):
        begin = perf_counter()
        small.add_(1)
        launched = perf_counter()
        streams.wait(streams.onload_stream, streams.record(streams.current_stream()))
        waits.append(perf_counter() - launched)
        launches.append(launched - begin)
    streams.synchronize(streams.record(streams.onload_stream))
    return {"launch_seconds": median(launches), "event_wait_seconds": median(waits), "kernel_round_trip_seconds": round_trip}
