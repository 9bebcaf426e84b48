"""The state machine: exactly the edges that DESIGN.md draws, and no others."""

from __future__ import annotations

import pytest

from lib_async_lowvram.core.states import IllegalTransition, UnitState, transition

S = UnitState
EDGES = {
    (S.HOST, S.ONLOADING),
    (S.ONLOADING, S.READY),
    (S.ONLOADING, S.ONLOADING),
    (S.ONLOADING, S.HOST),
    (S.READY, S.IN_USE),
    (S.READY, S.ONLOADING),
    (S.READY, S.WRITE_BACK),
    (S.READY, S.HOST),
    (S.IN_USE, S.READY),
    (S.IN_USE, S.WRITE_BACK),
    (S.WRITE_BACK, S.READY),
    (S.WRITE_BACK, S.HOST),
}


@pytest.mark.parametrize("before", S)
@pytest.mark.parametrize("after", S)
def test_edges(before: S, after: S) -> None:
    if (before, after) in EDGES:
        assert transition(before, after) is after
    else:
        with pytest.raises(IllegalTransition, match=before.value):
            transition(before, after)
