"""The extension's start: look at the host, say so in one line, take over what is loaded. Called by the extension's script, also when
scripts are run again (Reload UI), with this library perhaps older than its files by then.
"""

from __future__ import annotations

from lib_async_lowvram import __version__
from lib_async_lowvram.log import logger, remember, to_console
from lib_async_lowvram.webui import freshness
from lib_async_lowvram.webui.host import StandDown, detect
from lib_async_lowvram.webui.lowvram import Integration


def start() -> tuple[Integration | None, str]:
    """(the integration, "") or (None, why the extension stands down)."""
    to_console()
    remember()
    freshness.remember()
    if freshness.restart_needed():
        logger.warning(freshness.ADVICE)
    host = detect()
    if isinstance(host, StandDown):
        logger.info("%s: standing down: %s", __version__, host.reason)
        return None, host.reason
    integration = Integration.start(host)
    logger.info("%s: %s", __version__, integration.describe())
    return integration, ""
