"""One step of a picture in tiles: every piece through the model, many to a batch, and the predictions blended.

Problem: a latent too large to be computed at once is computed in pieces, which must look to the model like small pictures of their
own: the same timestep, their part of everything that has an extent, their prompt. The more pieces go through in one call, the less
often weights travel (a call streams them once), and the more memory it takes.

Invariants: a picture that is one tile under its own prompt is the very call that it was, with the very same objects, and its result
untouched. Otherwise each cell of the result is the weighted mean (`blending`) of all pieces over it, whichever batches they were in.

Out of memory: a batch that fails is halved and tried again, and stays so small, as long as it has two pieces. What is repeated is
that batch, not the step.

Torch only. Called on the thread and stream that compute; one object for one size of picture and one job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lib_async_lowvram.large.blending import Blend
from lib_async_lowvram.large.pieces import BACKGROUND, Piece, is_untiled
from lib_async_lowvram.large.spatial import CannotTile, cut, join
from lib_async_lowvram.log import logger

Apply = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
"""(latent [n, c, h, w], timesteps [n], conditions) -> prediction [n, c', h, w]"""

Prompts = Callable[[Sequence[int], Any], Mapping[int, Any]]
"""(numbers of the sources that are wanted, the picture's conditions for this batch) -> the conditions under each source's prompt; for
`BACKGROUND` the picture's own, as wide as the others"""


class TiledDenoiser:
    """`made`: the pieces of a picture of height x width cells. `group`: pieces per call, at least 1; `out_of_memory(error)`: whether a
    call failed for want of memory.

    Attributes:
        group: pieces per call now. calls: of the model, so far. halved: how often memory made `group` smaller.
    """

    def __init__(
        self, made: Sequence[Piece], group: int, out_of_memory: Callable[[BaseException], bool] = lambda error: False
    ) -> None:
        if not made or group < 1:
            raise ValueError(f"{len(made)} pieces in groups of {group} are no picture")
        self.pieces = list(made)
        self.group = group
        self.calls = self.halved = 0
        self._out_of_memory = out_of_memory
        self._weights: list[torch.Tensor] = []  # of the pieces, where the picture is
        self.untiled = is_untiled(self.pieces)

    def __call__(
        self, apply: Apply, latent: torch.Tensor, timesteps: torch.Tensor, cond: Any, prompts: Prompts | None = None
    ) -> torch.Tensor:
        """The prediction for `latent` [batch, channels, height, width]. `timesteps`: [batch], or one number. `prompts` is asked once
        where there are regions. CannotTile where `cond` cannot be cut, or regions have no prompts; errors of `apply` as they are."""
        if self.untiled:
            self.calls += 1
            return apply(latent, timesteps, cond)
        batch = latent.shape[0]
        conds = self._conds(cond, prompts)
        if not self._weights or self._weights[0].device != latent.device:
            self._weights = [piece.weights.to(latent.device) for piece in self.pieces]
        blend: Blend | None = None
        dtype = latent.dtype
        start = 0
        while start < len(self.pieces):
            group = self.pieces[start : start + self.group]
            predicted = self._predict(apply, group, latent, timesteps, conds)
            if predicted is None:
                continue
            if blend is None:
                dtype = predicted.dtype
                blend = Blend((batch, predicted.shape[1], *latent.shape[-2:]), latent.device)
            for number, (piece, values) in enumerate(zip(group, predicted.split(batch), strict=True), start=start):
                blend.add(piece.tile, values, self._weights[number])
            start += len(group)
        return blend.mean(dtype)

    def _conds(self, cond: Any, prompts: Prompts | None) -> Mapping[int, Any]:
        sources = sorted({piece.source for piece in self.pieces})
        if sources == [BACKGROUND]:
            return {BACKGROUND: cond}
        if prompts is None:
            raise CannotTile("there are regions, and nobody knows their prompts")
        return prompts(sources, cond)

    def _predict(
        self, apply: Apply, group: list[Piece], latent: torch.Tensor, timesteps: torch.Tensor, conds: Mapping[int, Any]
    ) -> torch.Tensor | None:
        """One call for these pieces, piece by piece; None when memory ran out and smaller groups are to be tried."""
        inputs = torch.cat([latent[..., piece.tile.rows, piece.tile.columns] for piece in group])
        times = timesteps.repeat(len(group)) if timesteps.dim() and timesteps.shape[0] == latent.shape[0] else timesteps
        joined = join([cut(conds[piece.source], piece.tile, latent) for piece in group])
        try:
            self.calls += 1
            predicted = apply(inputs, times, joined)
        except Exception as error:
            if len(group) == 1 or not self._out_of_memory(error):
                raise
        else:
            if predicted.shape[0] != inputs.shape[0] or predicted.shape[-2:] != inputs.shape[-2:]:
                raise CannotTile(f"the model made {tuple(predicted.shape)} of {tuple(inputs.shape)}")
            return predicted
        # Here the error is gone, and with it the frames that hold what was computed.
        self.group = max(1, len(group) // 2)
        self.halved += 1
        logger.warning("%d tiles at once are too many for this device's memory: %d from now on", len(group), self.group)
        return None
