"""Which errors say that the device is out of memory. Pure.

Problem: torch has a class for it, but attention that slices by free memory gives up with a plain RuntimeError of its own, and
libraries that allocate for themselves report theirs as theirs. All of these leave the device usable.
"""

from __future__ import annotations

import torch

DOGGETTX = "Not enough memory, use lower resolution"
"""How the WebUI's Doggettx attention begins its message when more than 64 slices would be needed."""

LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "HIP error: out of memory")


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` means that there was no room on the device."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return text.startswith(DOGGETTX) or any(each in text for each in LIBRARIES)
