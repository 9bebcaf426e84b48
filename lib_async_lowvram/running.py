"""Whether a thread is inside a call of some modules right now.

Problem: post hooks do not run for a BaseException (the WebUI's interrupt), so a pass that was interrupted stays open, and a
drain asked for by another thread would be put off for ever. The thread's own stack knows better.

Before Python 3.12 `sys._current_frames` holds the interpreter's list of threads locked while it allocates; a garbage collection
that starts there and finds a `threading.local` wants the same lock, and the process stands still. So none may start there.
"""

from __future__ import annotations

import gc
import sys

from torch import nn


def is_running(thread: int | None, *modules: nn.Module) -> bool:
    """Whether a frame of `thread` (by `threading.get_ident`) has one of `modules` as its `self`: its call, or its forward."""
    wanted = {id(module) for module in modules}
    collects = gc.isenabled()
    gc.disable()
    try:
        frame = sys._current_frames().get(thread)
    finally:
        if collects:
            gc.enable()
    while frame is not None:
        if id(frame.f_locals.get("self")) in wanted:
            return True
        frame = frame.f_back
    return False
