"""Every fault of the table, at every place: the job gives the same bits or the fault's error, and the next one is identical."""

from __future__ import annotations

import threading

import pytest

from tests.mover.fault_kinds import FAULTS, PHASES, Fault, Phase
from tests.mover.fault_table import all_places


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_at_every_place(fault: Fault, phase: Phase) -> None:
    threads = threading.active_count()
    all_places(fault, phase)
    assert threading.active_count() <= threads
