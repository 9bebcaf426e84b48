"""Is the library in memory the one in the files? An update followed by Reload UI leaves the old one there.

Problem: the WebUI's Reload UI runs our script anew, but modules stay in `sys.modules`: new scripts and a new page then talk to an old
library, until the process is started again. So what the files hold when the library is loaded is remembered in the library itself, and
compared whenever somebody wants to know. Nothing is reloaded: weights are in the hands of the old code.

`remember` is called by the extension's script at start, `restart_needed` on threads of the HTTP server, at most every `LOOK_SECONDS`.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

ADVICE = "The extension was updated: restart the WebUI (not only Reload UI) to use the new version."

LOOK_SECONDS = 5.0

_PACKAGE = Path(__file__).resolve().parents[1]

_loaded: str | None = None
_looked: tuple[float, bool] | None = None


def fingerprint(package: Path = _PACKAGE) -> str:
    """Of all Python files under `package`: names and contents. Files that cannot be read count by name."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        try:
            digest.update(path.read_bytes())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def remember(package: Path = _PACKAGE) -> None:
    """What is in memory came from these files. Only the first call counts: later ones meet the same library."""
    global _loaded
    if _loaded is None:
        _loaded = fingerprint(package)


def restart_needed(package: Path = _PACKAGE, now: float | None = None) -> bool:
    """Whether the files are others than those that the library was loaded from. False before `remember`."""
    global _looked
    now = time.monotonic() if now is None else now
    if _loaded is None:
        return False
    if _looked is None or now - _looked[0] >= LOOK_SECONDS:
        _looked = now, fingerprint(package) != _loaded
    return _looked[1]
