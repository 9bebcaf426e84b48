"""What one may ask the integration: its state in words, the figures, a timeline. Split from `lowvram`, which does things; this only reads.

Called on threads of the HTTP server, on the thread of a trial, and by the extension's script.
"""

from __future__ import annotations

from typing import Any

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.webui.announcement import SWITCHED_OFF, describe
from lib_async_lowvram.webui.host import Host
from lib_async_lowvram.webui.large_jobs import LargeJobs
from lib_async_lowvram.webui.models import ManagedModels
from lib_async_lowvram.webui.preview import LivePreviews
from lib_async_lowvram.webui.retry import Retries
from lib_async_lowvram.webui.settings import SettingsReader


class Answers:
    """The part of `Integration` that answers questions."""

    host: Host
    settings: SettingsReader
    large: LargeJobs
    _models: ManagedModels
    _previews: LivePreviews
    _retries: Retries
    _host_models: Any
    _enabled: bool
    _forced: bool | None
    _demoted: str | None
    _last_error: str | None

    def why_not(self) -> str:
        """Why weights do not travel with the model in use, or ""."""
        if not self._enabled or self._demoted:
            return self._demoted or SWITCHED_OFF
        managed = self._models.find(self._host_models.model_data.sd_model)
        return "" if managed is not None else "this model is left to stock --lowvram"

    def status(self) -> dict[str, Any]:
        """DESIGN.md "Status", as far as known; from any thread, without side effects."""
        mover = self._models.mover
        status = dict(mover.status()) if mover is not None else {}
        status["device"] = self.host.device_name
        status.update(preview=self._previews.status(), large=self.large.status())
        status.update(retries=self._retries.tried, retries_failed=self._retries.failed)
        status["on_disk"] = self._models.on_disk.status(self._host_models.model_data.sd_model)
        status["last_error"] = status.get("last_error") or self._last_error or self._retries.last_error
        if self._demoted:
            status.update(state="demoted", reason=self._demoted)
        elif not self._enabled:
            status.update(state="standing_down", reason=SWITCHED_OFF if self._forced is None else "a trial measures stock's moves")
        elif not self._models:
            none = self._host_models.model_data.sd_model is None
            status.update(state="standing_down", reason="no model is loaded yet" if none else "this model is left to the WebUI")
        return status

    def timeline(self) -> dict[str, Any]:
        """See `Looking.timeline`, with the frames of live previews."""
        mover = self._models.mover
        return mover.timeline(self._previews.recent()) if mover is not None else {"network": None, "seconds": 0.0, "spans": []}

    def config(self) -> OffloadConfig:
        """What the user has set."""
        return self.settings.config()

    def describe(self) -> str:
        """For the console line at start: device, budget, what will be done."""
        return describe(self.host, self.settings.config() if self._enabled else None)
