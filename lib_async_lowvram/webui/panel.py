"""`Panel`: everything the page's panel shows, put together: status, advice, messages, timeline, trial.

Problem: the mover knows figures, the host knows options and jobs, the console has said what went wrong; a user wants one place, also
where the extension stands down or failed to start. So this works without an integration, too.

Invariant: asking changes nothing, loads no model and opens no device. Called on threads of the HTTP server; made by the script.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from lib_async_lowvram.log import Remembered
from lib_async_lowvram.webui import freshness
from lib_async_lowvram.webui.advice import Host as Facts
from lib_async_lowvram.webui.advice import advise, fill
from lib_async_lowvram.webui.attention import slicing
from lib_async_lowvram.webui.lowvram import Integration
from lib_async_lowvram.webui.trial import Trial
from lib_async_lowvram.webui.trial_pictures import TrialPictures

SCHEMA = 1
"""Of the status and of the timeline; grows when a key changes its meaning or goes."""


class Panel:
    """`integration`: None where the extension stands down, for `reason`. `messages`: what the console has said."""

    def __init__(self, integration: Integration | None, reason: str, messages: Remembered) -> None:
        self._integration = integration
        self._reason = reason
        self._messages = messages
        self._host_shared = importlib.import_module("modules.shared")
        self.pictures: TrialPictures | None = None
        self.trial: Trial | None = None
        if integration is not None:
            host = integration.host
            self.pictures = TrialPictures(integration.force, integration.why_not, self._limit, host.device, host.simulated)
            self.trial = Trial(self.pictures)

    def _limit(self) -> float | None:
        return self._integration.status().get("limit_seconds")

    # -- what the page asks for ----------------------------------------------------------------------------------------
    def status(self) -> dict[str, Any]:
        """See docs/status.schema.json, but for keys that `status.complete` adds."""
        integration, state = self._integration, self._host_shared.state
        status = integration.status() if integration is not None else {"state": "standing_down", "reason": self._reason}
        stale = freshness.restart_needed()
        status.update(
            schema=SCHEMA,
            generating=state is not None and (state.job_count != 0 or bool(state.job)),
            messages=self._messages.newest(),
            restart=freshness.ADVICE if stale else "",
            disk=_disk(status),
            stock_pass_seconds=self.trial.stock_pass_seconds if self.trial is not None else None,
            trial=self.trial.status() if self.trial is not None else NO_TRIAL,
        )
        advices = advise(status, self._facts(stale))
        status.update(advices=advices, advice=fill(advices[0]) if advices else "")
        return status

    def timeline(self) -> dict[str, Any]:
        """The newest pass that was timed; the next one will be."""
        found = self._integration.timeline() if self._integration is not None else {"network": None, "seconds": 0.0, "spans": []}
        return {"schema": SCHEMA, **found}

    def start_trial(self) -> tuple[bool, str]:
        """See `Trial.start`."""
        return self.trial.start() if self.trial is not None else (False, self._reason)

    def stop_trial(self) -> None:
        """See `Trial.stop`."""
        if self.trial is not None:
            self.trial.stop()

    def note(self, p: Any) -> None:
        """A picture of the user's is about to be sampled; what `p` is, the host says."""
        if self.pictures is not None:
            self.pictures.note(p)

    # -- what the figures do not tell ------------------------------------------------------------------------------------
    def _facts(self, stale: bool) -> Facts:
        integration = self._integration
        batches = self._host_shared.opts.data.get("batch_cond_uncond")
        config = integration.config() if integration is not None else None
        return Facts(
            budget_bytes=config.budget_bytes if config is not None else 0,
            lookahead_bytes=config.lookahead_bytes if config is not None else 0,
            batches_cond_uncond=batches if isinstance(batches, bool) else None,
            slicing=slicing(),
            windows=sys.platform == "win32" and integration is not None and integration.host.device.type == "cuda",
            restart=stale,
        )


NO_TRIAL = {"state": "idle", "progress": 0.0, "reason": "", "result": None}


def _disk(status: Mapping[str, Any]) -> dict[str, Any] | None:
    """{"read_bytes", "bytes_per_s"} of the file tier; None where nothing is in files."""
    read, seconds = status.get("file_read_bytes") or 0, status.get("file_read_seconds") or 0.0
    if not status.get("file_bytes") and not read:
        return None
    return {"read_bytes": read, "bytes_per_s": read / seconds if seconds else None}
