"""One named logger for the whole extension, so that every line starts the same and a host can silence or redirect it.

The WebUI configures the root logger at level WARNING unless told otherwise; our few INFO lines are meant for its console,
so `to_console` (called by the WebUI entry and the command line, never at import) gives our logger a handler of its own.
"""

from __future__ import annotations

import logging
import sys

NAME = "async_lowvram"
PREFIX = "[Async LowVRAM]"

logger = logging.getLogger(NAME)


def to_console(level: int = logging.INFO) -> None:
    """Print our log lines to stderr, each behind `PREFIX`. Calling it again changes the level only."""
    if not any(getattr(handler, "_async_lowvram", False) for handler in logger.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"{PREFIX} %(message)s"))
        handler._async_lowvram = True
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level)
