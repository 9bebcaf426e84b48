"""Which units stay on the device, how large the ring is, and what that should give.

Problem: with M weight bytes and a budget, a cyclic scan defeats LRU entirely, while a fixed resident set of R bytes saves R
every pass; so budget goes to residents before it goes to lookahead (DESIGN.md, Why this plan). *Which* units matters too:
the deep blocks are nearly all weight and the shallow ones nearly all compute, and lookahead can only carry a ring's worth of
bytes through a stretch that is all compute.

Method: a few simple ways to choose residents, times a few ring sizes, each played through `core.pipeline`; the fastest wins.
The least compute per byte is usually it for a fast link, an even spread for a balanced one.

Pure; bytes and seconds; no torch. Caller: `network` after a learning pass and whenever the budget changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lib_async_lowvram.core.pipeline import Prediction, Workload, simulate
from lib_async_lowvram.core.ring import assign_offsets

Policy = Callable[[Workload, list[int], int], Iterator[int]]
"""(workload, units that may stream, bytes for residents) -> units in the order in which they deserve to be resident."""

GRAIN = 512
"""Bytes. Units are padded to a multiple of it and so are rings, so that every place in a ring is aligned (device.streams)."""


@dataclass(frozen=True)
class Plan:
    """What a network does with its budget.

    Attributes:
        resident: units that stay on the device between passes.
        ring_bytes: size of the slab the others stream through; 0 when everything is resident.
        offsets: place of every streamed unit in the ring, bytes.
        budget_bytes: the budget planned for: the wish, raised to the least that works.
        prediction: of one steady pass.
        limit_seconds: of this workload under this budget.
        notes: one line for each wish that could not be met.
    """

    resident: frozenset[int]
    ring_bytes: int
    offsets: dict[int, int]
    budget_bytes: int
    prediction: Prediction
    limit_seconds: float
    notes: tuple[str, ...] = ()


def least_budget(workload: Workload) -> int:
    """Bytes: what cannot stream, plus two of the largest unit that can (I2)."""
    fixed = workload.fixed_bytes + sum(workload.nbytes[unit] for unit in workload.must_reside)
    largest = max((size for unit, size in workload.nbytes.items() if unit not in workload.must_reside), default=0)
    return min(fixed + 2 * largest, workload.total_bytes)


def make_plan(workload: Workload, budget_bytes: int, *, lookahead_bytes: int = 0, small_unit_bytes: int = 0) -> Plan:
    """The fastest plan found for `budget_bytes`.

    `lookahead_bytes`: size of the ring, 0 = chosen here; clamped between two of the largest streamed unit and what the
    budget leaves. `small_unit_bytes`: units below it are made resident first. Raises nothing on any sizes >= 0: a budget
    that is too small is raised to `least_budget`, with a note.
    """
    notes: list[str] = []
    least = least_budget(workload)
    if budget_bytes < least:
        notes.append(f"budget raised from {budget_bytes >> 20} MB to {-(-least >> 20)} MB, the least that can stream this network")
        budget_bytes = least
    nbytes = workload.nbytes
    limit = workload.limit_seconds(budget_bytes)
    if workload.total_bytes <= budget_bytes:
        everything = frozenset(nbytes)
        return Plan(everything, 0, {}, budget_bytes, simulate(workload, everything, {}), limit, tuple(notes))

    must = workload.must_reside
    room = budget_bytes - workload.fixed_bytes - sum(nbytes[unit] for unit in must)
    free = [unit for unit in nbytes if unit not in must]
    order = [unit for unit, _ in workload.steps if unit not in must]
    best: Plan | None = None
    tried: set[tuple[frozenset[int], int]] = set()

    def attempt(choose: Policy, ring_bytes: int) -> float:
        """Predicted seconds; keeps the plan if it is the best so far."""
        nonlocal best
        ranked = choose(workload, others, max(0, room - ring_bytes - small_bytes))
        resident = must | _within(ranked, small, nbytes, room - ring_bytes)
        largest = max((nbytes[unit] for unit in nbytes if unit not in resident), default=0)
        if 2 * largest > ring_bytes or (resident, ring_bytes) in tried:
            return math.inf
        tried.add((resident, ring_bytes))
        streamed = [unit for unit in order if unit not in resident]
        # Units that do not fire in the learned order (conditional ones) need a place as well.
        silent = [unit for unit in free if unit not in resident and unit not in first]
        offsets = assign_offsets(streamed + silent, nbytes, ring_bytes)
        prediction = simulate(workload, resident, offsets)
        if best is None or prediction.seconds < best.prediction.seconds:
            best = Plan(resident, ring_bytes, offsets, budget_bytes, prediction, limit, ())
        return prediction.seconds

    first = set(order)
    small = sorted((unit for unit in free if nbytes[unit] < small_unit_bytes), key=nbytes.__getitem__)
    small_bytes = sum(nbytes[unit] for unit in small)
    others = [unit for unit in free if nbytes[unit] >= small_unit_bytes]
    smallest, *larger = _ring_sizes(workload, free, room, lookahead_bytes)
    ranked = sorted((attempt(choose, smallest), number) for number, choose in enumerate(_POLICIES))
    for ring_bytes in larger:
        for _, number in ranked[:2]:
            attempt(_POLICIES[number], ring_bytes)
    assert best is not None  # the first ring size is two of the largest unit of all, which every policy fits
    if lookahead_bytes and abs(best.ring_bytes - lookahead_bytes) >= 1 << 20:
        notes.append(
            f"lookahead of {lookahead_bytes >> 20} MB became {best.ring_bytes >> 20} MB: at least two of the largest streamed "
            "unit, at most what the budget leaves"
        )
    return Plan(best.resident, best.ring_bytes, best.offsets, budget_bytes, best.prediction, limit, tuple(notes))


def _ring_sizes(workload: Workload, free: list[int], room: int, wish: int) -> list[int]:
    """Ring sizes worth trying, in bytes, each a multiple of `GRAIN` and at most `room`. The first always works."""
    room = room // GRAIN * GRAIN
    largest = max(workload.nbytes[unit] for unit in free)
    always = min(2 * largest, room)
    if wish:
        return [min(max(-(-wish // GRAIN) * GRAIN, always), room)]
    sizes = [always]
    sizes += [size for factor in (3, 4, 6) if (size := factor * largest) <= room]
    sizes += [size for part in (8, 4, 2) if (size := room // part // GRAIN * GRAIN) >= always]
    # With the largest units resident a smaller ring is enough.
    by_size = sorted((workload.nbytes[unit] for unit in free), reverse=True)
    for rank in (len(by_size) // 32, len(by_size) // 8):
        if rank and 2 * by_size[rank] < always:
            sizes.append(2 * by_size[rank])
    return list(dict.fromkeys(sizes))


def _within(ranked: Iterable[int], small: Iterable[int], nbytes: Mapping[int, int], room: int) -> frozenset[int]:
    """As many of the ranked units as fit `room` bytes, after the small ones: a copy of those is nearly all overhead, and so
    are their hooks, whatever the ranking says."""
    chosen: set[int] = set()
    for unit in (*small, *ranked):
        size = nbytes[unit]
        if unit not in chosen and size <= room:
            chosen.add(unit)
            room -= size
    return frozenset(chosen)


def _seconds_per_unit(workload: Workload) -> dict[int, float]:
    total: dict[int, float] = {}
    for unit, seconds in workload.steps:
        total[unit] = total.get(unit, 0.0) + seconds
    return total


def _least_compute_per_byte(workload: Workload, free: list[int], room: int) -> Iterator[int]:
    seconds = _seconds_per_unit(workload)
    return iter(sorted(free, key=lambda unit: (seconds.get(unit, 0.0) / max(1, workload.nbytes[unit]), unit)))


def _largest(workload: Workload, free: list[int], room: int) -> Iterator[int]:
    return iter(sorted(free, key=lambda unit: (-workload.nbytes[unit], unit)))


def _in_order(workload: Workload, free: list[int]) -> list[int]:
    wanted = set(free)
    first = dict.fromkeys(unit for unit, _ in workload.steps if unit in wanted)
    return [*first, *(unit for unit in free if unit not in first)]


def _even(workload: Workload, free: list[int], room: int) -> Iterator[int]:
    """Resident bytes spread evenly along the pass."""
    total = sum(workload.nbytes[unit] for unit in free)
    share = min(1.0, room / total) if total else 1.0
    credit = 0.0
    for unit in _in_order(workload, free):
        credit += share * workload.nbytes[unit]
        if credit >= workload.nbytes[unit]:
            credit -= workload.nbytes[unit]
            yield unit


def _keeps_pace(workload: Workload, free: list[int], room: int) -> Iterator[int]:
    """Stream a unit only while the streamed bytes so far stay behind the share of computing done so far."""
    seconds = _seconds_per_unit(workload)
    compute = sum(seconds.get(unit, 0.0) for unit in free) or 1.0
    to_stream = sum(workload.nbytes[unit] for unit in free) - room
    computed, streamed = 0.0, 0
    for unit in _in_order(workload, free):
        computed += seconds.get(unit, 0.0)
        if streamed + workload.nbytes[unit] <= to_stream * computed / compute:
            streamed += workload.nbytes[unit]
        else:
            yield unit


_POLICIES: tuple[Policy, ...] = (
    _least_compute_per_byte,
    _largest,
    _even,
    _keeps_pace,
)
