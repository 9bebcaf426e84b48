"""Clears the CUDA error that a refused pinning leaves behind.

Problem: when `cudaHostRegister` is refused, the runtime keeps the error as this host thread's *pending* error, and the
next kernel launch anywhere reports it as its own (ComfyUI 14252). `cudaGetLastError` takes it away, but torch exposes no
such function in Python.

Mechanism: call `cudaGetLastError` (ROCm: `hipGetLastError`) of the very runtime library torch has loaded:
1. by `dlsym` on `torch._C`, which on Linux searches everything that library depends on, the CUDA runtime included;
2. by the path of a library already mapped into this process (`/proc/self/maps`), `libcudart*.so*` or `libamdhip64.so*`;
3. on Windows, by the handle of a module already loaded whose file lies beside torch's (`cudart64_*.dll`, `amdhip64*.dll`).
A second copy of the runtime is never loaded: it would have errors of its own. Where none is found (a statically linked
runtime), the pending error stays, `clear` says so, and `mechanism` is None; the caller logs it.

The pending error belongs to the host thread: `clear` must be called by the thread that got the refusal.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_MAPPED_RUNTIME = re.compile(r"^(libcudart|libamdhip64)\b.*\.so")
_WINDOWS_RUNTIMES = ("cudart64_*.dll", "amdhip64*.dll")


class PendingError:
    """Finds the runtime's get-last-error function once, when constructed.

    Attributes:
        mechanism: where it was found, for people; None when nowhere.
    """

    def __init__(self, get_last_error: Callable[[], int] | None = None, mechanism: str | None = None) -> None:
        """Arguments are for tests; by default the running torch's runtime is searched."""
        self._get_last_error, self.mechanism = get_last_error, mechanism
        if get_last_error is None:
            self._find("hipGetLastError" if torch.version.hip else "cudaGetLastError")

    def clear(self) -> bool:
        """Take this thread's pending error away. True when none is pending any more; False when that could not be done:
        no function was found, or the error is one that sticks (a lost device, a missing driver)."""
        if self._get_last_error is None:
            return False
        self._get_last_error()
        return self._get_last_error() == 0

    def _find(self, symbol: str) -> None:
        for mechanism, library in candidates():
            function = getattr(library, symbol, None)
            if function is not None:
                function.restype, function.argtypes = ctypes.c_int, []
                self._get_last_error, self.mechanism = function, f"{symbol} of {mechanism}"
                return


def candidates():
    """(where, library) of libraries of this process that may hold the runtime, best first. Loads nothing new."""
    if sys.platform == "win32":
        yield from _loaded_windows_runtimes()
        return
    yield "torch._C's dependencies", ctypes.CDLL(torch._C.__file__)
    for path in mapped_libraries(_MAPPED_RUNTIME):
        yield path, ctypes.CDLL(path)


def mapped_libraries(name: re.Pattern[str], maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Paths of files mapped into this process whose file name matches, each once; none where there is no /proc."""
    if not maps.exists():
        return []
    paths = (line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6)
    return list(dict.fromkeys(path for path in paths if name.match(Path(path).name) and Path(path).exists()))


def _loaded_windows_runtimes():
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    kernel32.GetModuleHandleW.restype, kernel32.GetModuleHandleW.argtypes = ctypes.c_void_p, [ctypes.c_wchar_p]
    for pattern in _WINDOWS_RUNTIMES:
        for path in sorted((Path(torch.__file__).parent / "lib").glob(pattern)):
            handle = kernel32.GetModuleHandleW(path.name)
            if handle:
                yield str(path), ctypes.CDLL(str(path), handle=handle)
