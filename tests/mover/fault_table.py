"""Faults of the device and of whoever uses it, at every place of every kind of pass: `python -m tests.mover.fault_table` prints the table.

One try: a network and its twin are brought to where a phase begins, a fault is armed, and one pass - the job - runs. It must give the
twin's bits or raise the error that the fault gives. The fault is over then (a hog gives back what it took), and the next passes must
give the twin's bits; at the end nothing may be left on the device, pinned, running or hooked, and all weights must be on the host and
the twin's. Where the twin must have changed weights that the job had changed before it failed, it is given the same changes.

A fault is tried at each place there is: the n-th copy, the n-th allocation, the k-th leaf; how many there are, a job without it tells.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tests.mover.fault_kinds import FAULTS, OOM, PHASES, RAISED, Fault, Interrupt, Phase, Rig


@dataclass
class Outcome:
    """Of all places of one fault in one phase."""

    tries: int = 0
    finished: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    told: int = 0
    """Tries after which the status had the error."""

    def row(self, fault: Fault, phase: Phase) -> str:
        raised = ", ".join(f"{count} raise {name}" for name, count in sorted(self.errors.items()))
        outcome = ", ".join(each for each in (f"{self.finished} finish with the same bits" if self.finished else "", raised) if each)
        return f"| {fault.name} | {phase.name} | {self.tries} | {outcome} | all {self.tries} |"


@contextlib.contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """Warnings and errors of ours meanwhile."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("async_lowvram")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def places(fault: Fault, phase: Phase) -> int:
    """How many there are."""
    rig = phase.rig()
    rig.streams.counts.clear()
    fault.arm(rig, 0)
    assert phase.job(rig)
    rig.streams.synchronize(rig.streams.record(rig.streams.onload_stream))
    rig.streams.synchronize(rig.streams.record(rig.streams.offload_stream))
    found = fault.places(rig)
    finish(rig)
    return found


def attempt(fault: Fault, phase: Phase, number: int, outcome: Outcome) -> None:
    """One try. Raises AssertionError where a promise is broken."""
    rig = phase.rig(**fault.limits(number))
    outcome.tries += 1
    with logged() as records:
        fault.arm(rig, number)
        try:
            assert phase.job(rig), "the job gave other bits"
            if fault.lingers:
                assert rig.next_pass(), "the job's second pass gave other bits"
                rig.mover.drain()
            outcome.finished += 1
        except (AssertionError, KeyError):
            raise
        except BaseException as error:
            assert isinstance(error, fault.raises), f"the job raised {error!r}"
            assert RAISED in str(error) or isinstance(error, (OOM, Interrupt)), f"the job raised {error!r}"
            name = type(error).__name__
            outcome.errors[name] = outcome.errors.get(name, 0) + 1
        rig.streams.disarm()
        for end in rig.after:
            end()
        for _ in range(3):
            assert rig.next_pass(), "the next pass gave other bits"
        status = rig.mover.status()
        assert not status["placement_faults"] or phase.grad or "the pass" in fault.name, status["last_error"]
        assert not rig.mover.demoted, rig.mover.demoted
        assert (status["tier"] == "pinned") == (not fault.limits(number)), status["tier"]
        finish(rig)
    errors = [record for record in records if record.levelno >= logging.ERROR]
    assert not errors, [record.getMessage() for record in errors]
    assert len(records) <= 2, [record.getMessage() for record in records]
    assert all("\n" not in record.getMessage() for record in records)
    if any(RAISED in record.getMessage() for record in records):
        assert RAISED in status["last_error"], status["last_error"]
        outcome.told += 1


def finish(rig: Rig) -> None:
    """Nothing may be left, and the weights must be the twin's."""
    rig.mover.drain()
    assert rig.streams.allocated_bytes == 0, f"{rig.streams.allocated_bytes} bytes left on the device"
    for name, mine in rig.net.state_dict().items():
        assert torch.equal(mine, rig.twin.state_dict()[name]), f"{name} is not what it should be"
    rig.mover.detach()
    assert rig.mover.host.pinned_bytes == 0, f"{rig.mover.host.pinned_bytes} bytes still pinned"
    for module in rig.net.modules():
        left = [hook for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
        assert not [hook for hook in left if "lib_async_lowvram" in hook.__module__], "hooks left"
    for name, mine in rig.net.state_dict().items():
        assert torch.equal(mine, rig.twin.state_dict()[name]), f"{name} is not what it should be"
    rig.mover.close()
    rig.streams.close()


def all_places(fault: Fault, phase: Phase) -> Outcome:
    outcome = Outcome()
    for number in range(1, places(fault, phase) + 1):
        try:
            attempt(fault, phase, number, outcome)
        except AssertionError as error:
            raise AssertionError(f"{fault.name}, {phase.name}, place {number}: {error}") from error
    return outcome


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("async_lowvram").propagate = False
    print("| fault | phase | tries | outcome | next passes identical, nothing left |\n|---|---|---|---|---|")
    tries = 0
    for fault in FAULTS:
        for phase in PHASES:
            outcome = all_places(fault, phase)
            tries += outcome.tries
            if outcome.tries:
                print(outcome.row(fault, phase), flush=True)
        gc.collect()
    print(f"\n{tries} tries")


if __name__ == "__main__":
    main()
