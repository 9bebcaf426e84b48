"""The tiled VAE in the WebUI: around one call of the VAE's own `encode` or `decode`.

Problem: those methods do more than call `encoder` or `decoder` - quantising convolutions, a distribution, an SDXL engine's options - and
differ between models. So they run as they are, and only the call of `vae.decoder` or `vae.encoder` inside is answered by
`large.tiled_vae`: for the length of the call the network has a `forward` of its own. It is put there on the thread that computes, inside
the mover's pass, and taken off before anything is computed; a network whose `forward` somebody else has replaced keeps that one.

When: `wish.mode` off - nothing is touched. Automatic - where the picture is larger than the wished tile, or its activations do not fit
what is free on the device now (the mover has taken its weights' part already, since its pass is open). On - always in bands, if there can
be two. A band has the area of a tile.

Invariants: I6 - whatever cannot be tiled is computed by the network's own forward, with one line in the log that says why. I7 - nothing
is left on the model, whatever is raised.

To be called by `lowvram.Integration.vae_pass`, inside `mover.running`:

    with self._models.mover.running(name), self._large_vae.around(vae, method, wish, mover.streams, mover.host):
        yield
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.large.host_room import spill_bytes
from lib_async_lowvram.large.rows import Untileable
from lib_async_lowvram.large.settings import ON, LargePictures
from lib_async_lowvram.large.tiled_vae import WHOLE, Limits, Report, run
from lib_async_lowvram.log import logger

PARTS = {"decode": "decoder", "encode": "encoder"}
TILE = 512
"""Pixels. Where tiles are wanted and none is given."""
KEPT_FREE = 0.1
"""Of the free device memory: the allocator's rounding, and what the VAE's methods do around its networks."""


class LargeVae:
    """See the module.

    Attributes:
        report: of the newest call that was answered here, or None. refused: why the newest one that could not be tiled was not; "".
    """

    def __init__(self) -> None:
        self.report: Report | None = None
        self.refused = ""

    @contextmanager
    def around(self, vae: nn.Module, method: str, wish: LargePictures, streams: Streams, host: HostMemory | None) -> Iterator[None]:
        """Inside, `vae`'s `method` ("encode", "decode") computes large pictures in bands. `streams`: of the device it is on. `host`: where
        spilled activations are allocated and pinned."""
        network = getattr(vae, PARTS[method], None)
        if wish.off or not isinstance(network, nn.Module) or "forward" in vars(network):
            yield
            return
        own = network.forward

        def answer(x: Any, *args: Any, **kwargs: Any) -> Any:
            del network.forward
            try:
                if args or kwargs or not isinstance(x, torch.Tensor) or x.dim() != 4:
                    return own(x, *args, **kwargs)
                return self._answer(network, own, x, method, wish, streams, host)
            finally:
                network.forward = answer

        network.forward = answer
        try:
            yield
        finally:
            if vars(network).get("forward") is answer:
                del network.forward

    def _answer(
        self, network: nn.Module, own: Any, x: torch.Tensor, method: str, wish: LargePictures, streams: Streams, host: HostMemory | None
    ) -> torch.Tensor:
        limits = limits_for(wish, x.shape, method, streams.free_memory())
        try:
            result, self.report = run(network, x, limits, host, whole=own)
        except Untileable as error:
            if str(error) != self.refused:
                self.refused = str(error)
                logger.warning("this picture's VAE %s is not computed in bands: %s", method, error)
            return own(x)
        self.refused = ""
        if self.report.mode != WHOLE:
            logger.info("VAE %s in bands: %s", method, in_one_line(self.report))
        return result


def limits_for(wish: LargePictures, shape: tuple[int, ...], method: str, free_bytes: int) -> Limits:
    """What one call may use. `shape`: of what goes into the network; latents have an eighth of the picture's rows and columns."""
    scale = 8 if method == "decode" else 1
    height, width = shape[2] * scale, shape[3] * scale
    tile = wish.tile or (TILE if wish.mode == ON else None)
    rows = None
    if tile is not None and max(height, width) > tile:
        rows = max(1, min(tile * tile // width, -(-height // 2)))
    return Limits(int((1 - KEPT_FREE) * free_bytes), spill_bytes(), rows)


def in_one_line(report: Report) -> str:
    """For the log."""
    text = f"{report.mode}, {report.bands} bands of {report.rows[0]} to {report.rows[1]} rows, {report.device_bytes >> 20} MB on the device"
    if report.host_bytes:
        text += f", {report.host_bytes >> 20} MB spilled ({report.pinned_bytes >> 20} MB pinned)"
    if report.in_strips:
        text += f"; statistics off by {report.statistics_error:.4f} standard deviations at most"
    return text
