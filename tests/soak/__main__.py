"""The long soak: `python -m tests.soak --passes 20000`. Prints what happened and what memory did; exit code 1 at the first
difference, with the seed and the last events."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

from lib_async_lowvram.device.heap import trim_heap
from tests.lora_double import LoraDouble
from tests.soak.server import Server

JOBS = 40
"""Per server."""


@dataclass(frozen=True)
class Footprint:
    """Of this process, everything collected and given back: resident bytes, threads, open file handles."""

    resident: int
    threads: int
    handles: int

    @staticmethod
    def now() -> Footprint:
        gc.collect()
        trim_heap()
        with open("/proc/self/statm", encoding="ascii") as statm:
            pages = int(statm.read().split()[1])
        return Footprint(pages * os.sysconf("SC_PAGE_SIZE"), threading.active_count(), len(os.listdir("/proc/self/fd")))

    def __str__(self) -> str:
        return f"{self.resident / 1e6:.1f} MB, {self.threads} threads, {self.handles} handles"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--passes", type=int, default=20_000, help="compared passes to reach (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first server; the next ones count on (default: 0)")
    options = parser.parse_args()
    happened: Counter[str] = Counter()
    passes = operations = 0
    seed, start, first = options.seed, time.monotonic(), None
    while passes < options.passes:
        server = None
        try:
            with LoraDouble() as lora:
                server = Server(seed, lora)
                for _ in range(JOBS):
                    server.job()
                server.close()
        except BaseException:
            traceback.print_exc()
            print(f"seed {seed}, after {passes + (server.passes if server else 0)} passes; the last events:", file=sys.stderr)
            for line in server.log[-30:] if server else []:
                print(f"    {line}", file=sys.stderr)
            return 1
        happened += server.happened
        passes += server.passes
        operations += server.streams.operations
        del server
        seed += 1
        footprint = Footprint.now()
        if first is None or seed - options.seed <= 3:
            first = footprint  # the first servers warm up caches
        if (seed - options.seed) % 10 == 0:
            print(f"{time.monotonic() - start:6.0f} s  {passes:6d} passes  {sum(happened.values()):6d} events  {footprint}", flush=True)
    print(f"\n{seed - options.seed} servers, {happened['job']} jobs, {passes} passes compared, {operations} stream operations judged")
    print("events: " + ", ".join(f"{what} {count}" for what, count in sorted(happened.items())))
    print(f"after the first three servers: {first}\nat the end:                    {Footprint.now()}")
    print("pixel differences: 0, ordering violations: 0, placement faults: 0")
    return 0


if __name__ == "__main__":
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-8, 1)  # one arena: threads' leftovers would look like growth (M_ARENA_MAX)
    sys.exit(main())
