"""Async LowVRAM: weights travel to the GPU while the GPU computes.

The story in one paragraph. A network whose weights do not fit on the device runs as a cycle of *passes*. Its weights live
in packed, pinned *host masters*. During the first pass - the learning pass - whole regions move as stock `--lowvram` moves
them, and hooks note which leaves fire, in which order, and how long each computes. From that a plan is made: a *resident
set* that stays on the device, and a *ring* of preallocated device memory through which everything else streams, each unit
copied ahead of its use on a copy stream, published only after the consumer's own stream has waited for the copy, and
dropped after its last use. A unit that somebody changed is written back to its master first. Same pixels, bit for bit.

    from lib_async_lowvram import AsyncModelMover, OffloadConfig

    with AsyncModelMover(OffloadConfig(budget_bytes=512 << 20), "cuda:0") as mover:
        mover.attach({"unet": unet})
        with torch.no_grad():
            for _ in range(steps):
                latent = unet(latent, ...)

Layers (a layer imports itself or lower ones; a test enforces it): 0 `config`, `log`, `core` - no torch; 1 `device`;
2 `mover`, `network`, `unit_hooks`, `lifecycle`; 3 `webui`; `bench` and `commands` stand beside 3.

Importing this package imports no torch and makes no thread, stream or event; the public names load on first use.
"""

from __future__ import annotations

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncModelMover": "lib_async_lowvram.mover",
    "NetworkSpec": "lib_async_lowvram.network_spec",
    "Region": "lib_async_lowvram.network_spec",
    "OffloadConfig": "lib_async_lowvram.config",
    "open_streams": "lib_async_lowvram.device.choose",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
