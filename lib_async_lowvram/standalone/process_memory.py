"""What the system says of this process's memory. None where it does not say (Windows).

Resident memory counts pages of mapped files that were touched as well as memory of our own. Any thread.
"""

from __future__ import annotations

import sys
from pathlib import Path


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Now."""
    try:
        import resource

        pages = int(statm.read_text(encoding="ascii").split()[1])
    except (ImportError, OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()


def peak_bytes() -> int | None:
    """The most at any time since the process began."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10  # in bytes there, in kilobytes elsewhere
