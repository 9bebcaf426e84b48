"""Whether a thread is inside a module's call, read off its stack without stopping the process."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
from torch import nn

from lib_async_lowvram.running import is_running


class Asking(nn.Module):
    def forward(self, other: nn.Module) -> tuple[bool, bool]:
        return is_running(threading.get_ident(), self), is_running(threading.get_ident(), other)


def test_inside_a_call_and_outside() -> None:
    module, other = Asking(), Asking()
    assert module(other) == (True, False)
    assert not is_running(threading.get_ident(), module)
    assert not is_running(None, module)
    assert not is_running(-1, module)


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_collection_starts_while_the_stacks_are_taken(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    # It deadlocked the whole process: `sys._current_frames` of Python 3.10 and 3.11 against a `threading.local` in a cycle.
    seen: list[bool] = []
    frames = sys._current_frames

    def current_frames() -> dict:
        seen.append(gc.isenabled())
        return frames()

    monkeypatch.setattr(sys, "_current_frames", current_frames)
    try:
        if not collects:
            gc.disable()
        is_running(threading.get_ident(), nn.Module())
        assert seen == [False]
        assert gc.isenabled() is collects
    finally:
        gc.enable()
