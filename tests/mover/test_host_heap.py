"""The weights' old home in main memory is given back: packing a model must not hold its size a second time in free pages."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib_async_lowvram.device import heap

GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim")
PROGRAM = """
import torch
from torch import nn
from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.device.simulated import SimulatedStreams

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

# Loading a checkpoint frees tensors like this one; from then on the allocator takes requests up to its size from the heap.
big = torch.ones(30 << 18)
del big
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(200)))
keep = torch.ones(1 << 10)  # above the model, so that the heap's end does not shrink by itself
streams = SimulatedStreams()
before = resident()
with AsyncModelMover(OffloadConfig(), streams) as mover:
    mover.attach({"net": model})
    weights = mover.host.host_bytes
    print(weights, resident() - before)
streams.close()
"""


@pytest.mark.skipif(not GLIBC, reason="only glibc keeps freed pages")
def test_a_packed_model_is_in_main_memory_once():
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    weights, grown = map(int, done.stdout.split())
    assert weights >= 200 << 20
    assert grown < weights // 4


def test_without_glibc_there_is_nothing_to_trim(monkeypatch):
    monkeypatch.setattr(heap, "_TRIM", None)
    assert heap.trim_heap() is False
