"""The states of a unit and the function that changes them; past it go only the changes in `AT_ONCE`.

    HOST        parameters point at the master; no device memory
    ONLOADING   device memory is taken and a copy into it is enqueued; nobody may read it yet
    READY       the consumer's stream has waited for the copy (or the copy is known done); clean
    IN_USE      published: parameters point at the device memory between acquire and release
    WRITE_BACK  a changed copy is on its way to the master; the master is not true for anybody who has not waited

Caller: `device.weights.Unit`, under the mover's lock. An illegal transition is a bug in the mover, never a condition
of the host, and raises.
"""

from __future__ import annotations

from enum import Enum


class UnitState(Enum):
    HOST = "host"
    ONLOADING = "onloading"
    READY = "ready"
    IN_USE = "in use"
    WRITE_BACK = "write-back"

    # Enum's default hash goes through the name; units change state hundreds of times a pass.
    __hash__ = object.__hash__


HOST, ONLOADING, READY, IN_USE, WRITE_BACK = UnitState
"""The same, for code that runs at every use of every unit: an attribute of an `Enum` takes as long to read as a small function call."""

_S = UnitState
LEGAL: dict[UnitState, frozenset[UnitState]] = {
    _S.HOST: frozenset({_S.ONLOADING}),
    _S.ONLOADING: frozenset(
        {
            _S.READY,  # the consumer's stream waits for `copied`
            _S.ONLOADING,  # the master changed meanwhile: fetched again into the same memory
            _S.HOST,  # prefetched and not wanted after all
        }
    ),
    _S.READY: frozenset(
        {
            _S.IN_USE,
            _S.ONLOADING,  # the master changed since: fetched again
            _S.WRITE_BACK,  # a resident found changed by the sweep
            _S.HOST,  # dropped: a clean copy is forgotten, never copied back (I5)
        }
    ),
    _S.IN_USE: frozenset({_S.READY, _S.WRITE_BACK}),
    _S.WRITE_BACK: frozenset(
        {
            _S.READY,  # kept on the device: the copy there is the newer one
            _S.HOST,  # the write-back was waited for
        }
    ),
}

AT_ONCE = {(ONLOADING, IN_USE): (READY,), (IN_USE, HOST): (READY,), (HOST, ONLOADING): ()}
"""(from, to): the states on the way. Changes that are made by assignment in passes that are followed (`steady`, `Transfers.onload_again`),
where the state has just been looked at: there each call costs a share of the time per pass."""


class IllegalTransition(RuntimeError):
    """The mover tried to move a unit between two states that have no edge."""


def transition(current: UnitState, new: UnitState) -> UnitState:
    """`new`, if the edge exists; raises `IllegalTransition` otherwise."""
    if new not in LEGAL[current]:
        raise IllegalTransition(f"{current.value} -> {new.value}")
    return new
