"""Blocks of host memory for the simulated device, and what poisoned memory looks like."""

from __future__ import annotations

import torch


def host_block(memory, values):
    block = memory.allocate(len(values))
    block.copy_(torch.tensor(values, dtype=torch.uint8))
    memory.pin(block)
    return block


def poisoned(tensor):
    return bool((tensor == 0xFF).all())
