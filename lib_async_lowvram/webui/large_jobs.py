"""Large pictures, job by job: what the controls ask for is read, said under the picture, and carried out until the job is over.

Problem: a script's `process` may come several times in one job of the host (X/Y/Z plot), `postprocess` never when it failed, and what a
user asked for may be nonsense. A job whose settings cannot be read is made without tiles, and says so under the picture: the host
swallows what a script raises.

Called on the thread that runs jobs; `status` on any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.large.settings import LargePictures
from lib_async_lowvram.log import logger
from lib_async_lowvram.webui.large_denoise import LargeDenoise
from lib_async_lowvram.webui.large_ui import OVERRIDES, asked, infotext_of
from lib_async_lowvram.webui.large_vae import LargeVae, in_one_line
from lib_async_lowvram.webui.models import ManagedModels


def room(streams: Any, config: OffloadConfig) -> int:
    """Bytes that a UNet's activations may take while tiles are computed. Weights are left their budget, or a quarter of all where it is
    automatic: they travel once per call whatever is resident, so memory serves a larger group of tiles better. An eighth of all, at most
    half the reserve, stays free."""
    total = streams.free_memory() + streams.allocated_bytes
    weights = config.budget_bytes or total // 4 + config.preview_bytes
    return max(0, total - weights - min(config.reserve_bytes // 2, total // 8))


class LargeJobs:
    """`why_not()`: why nothing can be done for the model in use now, or ""."""

    def __init__(self, denoise: LargeDenoise, why_not: Callable[[], str], vae: LargeVae | None = None) -> None:
        self._denoise = denoise
        self._vae = vae or LargeVae()
        self._why_not = why_not
        self.settings = LargePictures()

    @classmethod
    def over(cls, models: ManagedModels, config: Callable[[], OffloadConfig], why_not: Callable[[], str]) -> LargeJobs:
        """For the models that are on the mover."""
        return cls(LargeDenoise(lambda model: room(models.mover.streams, config()), models.holding), why_not)

    def begin(self, p: Any, args: Sequence[Any]) -> None:
        """`p`: the host's processing object; `args`: of the script's controls."""
        self.end()
        try:
            settings, notes = asked(args, getattr(p, OVERRIDES, None))
        except ValueError as error:
            _say(p, f"{error}; made without tiles and regions")
            return
        if settings.off:
            return
        reason = self._why_not()
        if reason:
            _say(p, f"{reason}; made without tiles and regions")
            return
        for note in notes:
            _say(p, note)
        self.settings = settings
        p.extra_generation_params.update(infotext_of(settings))
        self._denoise.begin(p, settings)

    def end(self) -> None:
        """The job is over. Idempotent."""
        self.settings = LargePictures()
        self._denoise.end()

    def around_vae(self, vae: nn.Module, method: str, streams: Streams, host: HostMemory) -> AbstractContextManager[None]:
        """To be open while `vae`'s own `method` computes, inside the mover's pass: see `large_vae`."""
        return self._vae.around(vae, method, self.settings, streams, host)

    def status(self) -> dict[str, Any] | None:
        """Of the open job, or None. "vae": how its newest call was made, once one was."""
        found = self._denoise.status()
        return found if found is None else {**found, "vae": in_one_line(self._vae.report) if self._vae.report is not None else ""}


def _say(p: Any, text: str) -> None:
    line = text if text.startswith("large pictures: ") else f"large pictures: {text}"
    logger.warning("%s", line)
    p.comment(line[0].upper() + line[1:])
