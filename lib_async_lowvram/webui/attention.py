"""Attention that slices by free memory, and how much must stay free for stock's slices.

Problem: under Doggettx (the WebUI's default without xformers), InvokeAI and sub-quadratic attention, pictures depend on how much
device memory happens to be free: it decides in how many slices attention is computed. Stock `--lowvram` leaves nearly everything
free; an automatic budget that fills the device with weights would get other slices, and other pixels (I1). So it leaves what stock
would have needed for the slices that stock would have used.

The WebUI's rules (modules/sd_hijack_optimizations.py, 1.10.1), with s the bytes of one attention matrix, batch x heads x tokens
squared x bytes of a value, at the largest level, and f what is free:

    Doggettx        2 ** ceil(log2(3 s / f)) slices, 2.5 s where values have four bytes
    InvokeAI        1, or the next power of two above 3.3 s / f
    sub-quadratic   one if s <= 0.7 f (or the share that --sub-quad-chunk-threshold says), else chunks of a size that follows f

What stock has free is what is free without any weights, less one block's. Pure apart from reading the host; called by the mover
under its lock, when it makes a plan.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import nn

from lib_async_lowvram.log import logger

DOGGETTX, INVOKEAI, SUB_QUADRATIC = "Doggettx", "InvokeAI", "sub-quadratic"
SLICED = (DOGGETTX, INVOKEAI, SUB_QUADRATIC)
BESIDE = 16
"""Other tensors as large as the attention's input that live while it runs: skip connections, queries, keys, values."""

MARGIN = 1.02


def method_in_use() -> str:
    """The host's name for its attention; "" before it has applied any."""
    hijack = sys.modules.get("modules.sd_hijack")  # the host has imported it long before there is a model
    return getattr(getattr(hijack, "model_hijack", None), "optimization_method", None) or ""


def slicing() -> str:
    """The method in use where it slices by free memory, else ""."""
    method = method_in_use()
    return method if method in SLICED else ""


def first_attention(unet: nn.Module) -> tuple[int, int, int] | None:
    """(heads, channels, times by which height and width were halved) of the largest attention; None where there is none."""
    scale = 1
    for block in getattr(unet, "input_blocks", ()):
        for module in block.modules():
            if type(module).__name__ == "Downsample":
                scale *= 2
            if hasattr(module, "heads") and isinstance(getattr(module, "to_q", None), nn.Module):
                return module.heads, module.to_q.weight.shape[1], scale
    return None


def wanted(method: str, matrix_bytes: int, value_bytes: int, threshold: float | None = None) -> float:
    """Free bytes at which attention just is computed in one piece. `threshold`: of sub-quadratic, percent; None: 70; 0: always."""
    if method == DOGGETTX:
        return matrix_bytes * (3.0 if value_bytes == 2 else 2.5)
    if method == INVOKEAI:
        return matrix_bytes * 3.3
    if method == SUB_QUADRATIC and threshold != 0:
        return matrix_bytes / (0.7 if threshold is None else threshold / 100)
    return 0.0


def bytes_for_stocks_slices(method: str, wanted_bytes: float, stock_free_bytes: int) -> float:
    """What must be free for as many slices as with `stock_free_bytes`."""
    if not wanted_bytes or stock_free_bytes <= 0:
        return 0.0
    if wanted_bytes <= stock_free_bytes:
        return wanted_bytes
    if method == SUB_QUADRATIC:
        return 0.0  # in chunks either way, of a size that nobody can keep
    return wanted_bytes / 2 ** math.ceil(math.log2(wanted_bytes / stock_free_bytes))


class SliceKeeper:
    """The mover's `keep_free`. `shared`, `models`: the host's modules of these names."""

    def __init__(self, shared: Any, models: Any) -> None:
        self._shared = shared
        self._models = models
        self._told = ""

    def __call__(self, network: str, shapes: tuple | None, room_bytes: int) -> int:
        """See `Context.keep_free`. 0 for networks without such attention. Never raises: a model or host that cannot be read gives
        0, with one line in the log."""
        try:
            return self._kept(network, shapes, room_bytes)
        except Exception as error:  # in the middle of sampling
            if str(error) != self._told:
                self._told = str(error)
                logger.warning("cannot tell how %s attention slices: %s", method_in_use(), error)
            return 0

    def _kept(self, network: str, shapes: tuple | None, room_bytes: int) -> int:
        method = method_in_use()
        model = self._models.model_data.sd_model
        unet = getattr(getattr(model, "model", None), "diffusion_model", None)
        if network != "unet" or method not in SLICED or unet is None or not shapes or len(shapes[0]) != 4:
            return 0
        found = first_attention(unet)
        if found is None:
            return 0
        heads, channels, scale = found
        batch, _, height, width = shapes[0]
        tokens = math.ceil(height / scale) * math.ceil(width / scale)
        value = 4 if getattr(self._shared.opts, "upcast_attn", False) else next(unet.parameters()).element_size()
        threshold = getattr(self._shared.cmd_opts, "sub_quad_chunk_threshold", None)
        needed = wanted(method, batch * heads * tokens * tokens * value, value, threshold)
        largest = max((_weight_bytes(block) for block in _blocks(unet)), default=0)
        kept = bytes_for_stocks_slices(method, needed, room_bytes - largest)
        return int(kept * MARGIN) + BESIDE * batch * height * width * channels * value if kept else 0


def _blocks(unet: nn.Module) -> list[nn.Module]:
    return [*unet.input_blocks, unet.middle_block, *unet.output_blocks]


def _weight_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
