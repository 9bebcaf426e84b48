"""One named logger for the whole extension, so that every line starts the same and a host can silence or redirect it.

The WebUI configures the root logger at level WARNING unless told otherwise; our few INFO lines are meant for its console,
so `to_console` (called by the WebUI entry and the command line, never at import) gives our logger a handler of its own.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import OrderedDict

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


class Remembered(logging.Handler):
    """Keeps the newest distinct lines, so that a panel can show what the console said. Never fails, never grows: the oldest goes first.

    Its own lock is the logging module's per handler; `newest` may be asked from any thread."""

    def __init__(self, most: int = 20) -> None:
        super().__init__(logging.INFO)
        self._most = most
        self._lines: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            key = (record.levelname.lower(), record.getMessage())
        except Exception:  # a broken format string of somebody's: logging's own way to tell
            self.handleError(record)
            return
        with self._guard:
            _, count = self._lines.pop(key, (0.0, 0))
            self._lines[key] = (record.created, count + 1)
            while len(self._lines) > self._most:
                self._lines.popitem(last=False)

    def newest(self) -> list[dict[str, object]]:
        """{"at": unix seconds of the last time, "level", "text", "count"}, newest first."""
        with self._guard:
            lines = list(self._lines.items())
        return [{"at": at, "level": level, "text": text, "count": count} for (level, text), (at, count) in reversed(lines)]


def remember() -> Remembered:
    """The logger's memory of what was said; started with the first call, from a host's entry, never at import."""
    found = next((handler for handler in logger.handlers if getattr(handler, "_async_lowvram_memory", False)), None)
    if found is None:
        found = Remembered()
        found._async_lowvram_memory = True
        logger.addHandler(found)
    return found
