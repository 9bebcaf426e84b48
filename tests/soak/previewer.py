"""Previews of the soak: a thread of their own reads the masters of the VAE while everything else happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.preview import NoRoom, PreviewWorker
from lib_async_lowvram.shadow import Shadow
from tests.mover.chains import X, judged
from tests.soak.checkpoint import vae_spec

if TYPE_CHECKING:
    from tests.soak.server import Server


class Previewer:
    """Frames decoded by a shadow of the VAE, on a thread and streams of their own, beside the passes."""

    def __init__(self, server: Server) -> None:
        vae, mover = server.checkpoint.nets["vae"], server.mover
        with torch.no_grad():
            self._expected = server.checkpoint.twins["vae"](X)
        masters = mover.masters(["vae"])
        self._shadow = Shadow(vae, lambda parameter: masters.get(id(parameter)))
        self._streams = server.streams.sibling()
        config = OffloadConfig(budget_bytes=1, small_leaf_bytes=0)
        self._mover = AsyncModelMover(config, self._streams, host=mover.host)
        self._mover.attach({"vae": vae_spec(self._shadow.module)})
        self._worker = PreviewWorker(self._streams, mover.host, lambda pixels: pixels, lambda shown: None)
        self._wrong = 0
        self._count = 0

    def submit(self) -> None:
        """Another frame."""
        self._count += 1
        self._worker.submit(torch.zeros(1, 4, 2, 2), self._decode, self._count)

    def _decode(self, latent: torch.Tensor) -> torch.Tensor:
        try:
            with judged(self._streams):
                got = self._shadow.module(X)
        except torch.cuda.OutOfMemoryError as error:
            raise NoRoom from error  # somebody took it all
        if not torch.equal(got, self._expected):
            self._wrong += 1
        return latent[:, :3]

    def close(self) -> None:
        """The last frame is waited for; none was wrong."""
        self._worker.quiesce()
        self._worker.close()
        assert self._wrong == 0, "a preview was wrong"
        assert self._worker.counters.errors == 0
        self._mover.close()
        self._streams.close()
