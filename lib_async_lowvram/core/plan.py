"""Which units stay on the device, how large the ring is, and what that should give.

Problem: with M weight bytes and a budget, a cyclic scan defeats LRU entirely, while a fixed resident set of R bytes saves R
every pass; so budget goes to residents before it goes to lookahead (DESIGN.md, Why this plan). *Which* units matters too:
the deep blocks are nearly all weight and the shallow ones nearly all compute, and lookahead can only carry a ring's worth of
bytes through a stretch that is all compute.

Method: a few rules for residents (`core.search`) times a few ring sizes, judged by a quick estimate (`core.cycle`); finer sizes
around the best and small changes to it; the best few get places in the ring (`core.places`) and are played through
`core.pipeline`, and the fastest wins. What the residents leave of the budget is the ring's.

Pure; bytes and seconds; no torch. Caller: `network` after a learning pass and whenever what it was made from changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lib_async_lowvram.core.cycle import Cycle
from lib_async_lowvram.core.floor import floor_seconds
from lib_async_lowvram.core.pipeline import Prediction, Workload, simulate
from lib_async_lowvram.core.places import assign_offsets
from lib_async_lowvram.core.proposals import Proposals
from lib_async_lowvram.core.search import improve

GRAIN = 512
"""Bytes. Units are padded to a multiple of it and so are rings, so that every place in a ring is aligned (device.streams)."""

SMALL_FIRST = 0.01
"""Share of a pass that keeping all small units resident may cost: each streamed unit also costs the host a hook."""

PLAYED = 3
"""Resident sets that are placed and played."""

STEPS_TO_IMPROVE, LEAST_TRIES = 40_000, 100
"""Steps estimated while small changes are tried, all tries together: 20 ms. Fewer tries than the least gain nothing."""

NEAR_ENOUGH = 0.0005
"""Share of the floor, within which nothing better is looked for."""

LOST_TO_PLACES = 0.002
"""Share of the estimated time that places may cost before other places are tried."""

TIGHT = 4
"""Times its largest unit: a ring that is larger has room for two of them wherever they are."""

FEW, FEW_COST = 24, 4
"""Steps up to which small changes are judged by playing them: with few units in a ring, where they stand decides. Playing costs
so many times what estimating does."""

MANY = 600
"""Streamed units from which on only the better way to find places is tried again: each takes ten milliseconds."""

HEAT, FEW_HEAT = 0.0001, 0.1
"""To begin annealing with: a share of the time per pass; one unit in a hundred changes little, one in ten much."""

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
    budget leaves. `small_unit_bytes`: units below it are made resident first, unless that makes passes longer by more than
    `SMALL_FIRST`. Raises nothing on any sizes >= 0: a budget that is too small is raised to `least_budget`, with a note.
    """
    notes: list[str] = []
    least = least_budget(workload)
    if budget_bytes < least:
        notes.append(f"budget raised from {budget_bytes >> 20} MB to {-(-least >> 20)} MB, the least that can stream this network")
        budget_bytes = least
    limit = workload.limit_seconds(budget_bytes)
    if workload.total_bytes <= budget_bytes:
        everything = frozenset(workload.nbytes)
        return Plan(everything, 0, {}, budget_bytes, simulate(workload, everything, {}, 0), limit, tuple(notes))
    plan = _Search(workload, budget_bytes, lookahead_bytes, small_unit_bytes).plan()
    if lookahead_bytes and abs(plan.ring_bytes - lookahead_bytes) >= 1 << 20:
        notes.append(
            f"lookahead of {lookahead_bytes >> 20} MB became {plan.ring_bytes >> 20} MB: at least two of the largest streamed "
            "unit, at most what the budget leaves"
        )
    return replace(plan, notes=tuple(notes))


class _Search:
    """For one workload and budget, of which not everything fits. A *set* is one of residents, those that must be included; what
    it leaves of the budget is the ring's, unless the user wished for a size."""

    def __init__(self, workload: Workload, budget_bytes: int, wish: int, small_unit_bytes: int) -> None:
        nbytes = workload.nbytes
        self._workload = workload
        self._nbytes = nbytes
        self._budget = budget_bytes
        self._limit = workload.limit_seconds(budget_bytes)
        self._enough = floor_seconds(workload, budget_bytes) * (1 + NEAR_ENOUGH)  # seconds at which a search may end
        self._must = frozenset(workload.must_reside)
        self._room = (budget_bytes - workload.fixed_bytes - sum(nbytes[unit] for unit in self._must)) // GRAIN * GRAIN
        self._by_size = sorted((unit for unit in nbytes if unit not in self._must), key=nbytes.__getitem__, reverse=True)
        self._always = min(2 * nbytes[self._by_size[0]], self._room)  # a ring of this size carries any of them
        self._wish = min(max(-(-wish // GRAIN) * GRAIN, self._always), self._room) if wish else 0
        self._small = [unit for unit in reversed(self._by_size) if nbytes[unit] < small_unit_bytes]
        self._cycle = Cycle(workload)
        self._few = len(workload.steps) <= FEW
        self._placing: tuple[bool, ...] = (False, True)  # ways to find places that are tried, `spread` of each

    def plan(self) -> Plan:
        """The fastest found."""
        kept: frozenset[int] = frozenset()
        proposals = self._proposals(kept)
        proposals.look()
        if self._small:
            small = self._fitting(self._small)
            with_small = self._proposals(small)
            with_small.look_as(proposals)
            if with_small.seconds <= proposals.seconds * (1 + SMALL_FIRST):
                proposals, kept = with_small, small
        plan: Plan | None = None
        for seconds, resident in proposals.ranked()[:PLAYED]:
            if plan is None or seconds < plan.prediction.seconds:
                plan = self._played(resident, plan)
        for resident in self._changed(plan.resident, kept)[:PLAYED]:
            plan = self._played(resident, plan)
        return plan

    def _proposals(self, kept: frozenset[int]) -> Proposals:
        room = self._room - sum(self._nbytes[unit] for unit in kept)
        return Proposals(self._workload, self._must | kept, room, self._ring_sizes(room), not self._wish, self._estimate, self._enough)

    def _fitting(self, units: list[int]) -> frozenset[int]:
        """As many of them, from the first, as leave room for the ring."""
        room = self._room - (self._wish or self._always)
        chosen = set()
        for unit in units:
            room -= self._nbytes[unit]
            if room < 0:
                break
            chosen.add(unit)
        return frozenset(chosen)

    # -- judging -------------------------------------------------------------------------------------------------------
    def _ring_bytes(self, resident: frozenset[int]) -> int:
        """Of the ring beside these residents; 0 when it cannot carry the others."""
        nbytes = self._nbytes
        left = self._room - sum(nbytes[unit] for unit in resident - self._must)
        ring_bytes = min(self._wish or left, left) // GRAIN * GRAIN
        largest = next((nbytes[unit] for unit in self._by_size if unit not in resident), 0)
        return ring_bytes if 2 * largest <= ring_bytes and ring_bytes >= self._wish else 0

    def _estimate(self, resident: frozenset[int]) -> float:
        """Seconds per pass; infinity where the ring cannot carry the others."""
        ring_bytes = self._ring_bytes(resident)
        return self._cycle.seconds(resident, ring_bytes) if ring_bytes else math.inf

    def _played(self, resident: frozenset[int], best: Plan | None) -> Plan | None:
        """The better one of `best` and what these residents give, with every unit in its place."""
        ring_bytes = self._ring_bytes(resident)
        if not ring_bytes or (best is not None and best.prediction.seconds <= self._enough):
            return best
        steps = dict.fromkeys(unit for unit, _ in self._workload.steps if unit not in resident)
        # Units that do not fire in the learned order (conditional ones) need a place as well.
        order = [*steps, *(unit for unit in self._nbytes if unit not in steps and unit not in resident)]
        largest = max((self._nbytes[unit] for unit in steps), default=0)
        better = self._placing[0]
        hoped = self._estimate(resident) * (1 + LOST_TO_PLACES)
        for spread in self._placing:
            offsets = assign_offsets(order, self._nbytes, ring_bytes, spread=spread)
            prediction = simulate(self._workload, resident, offsets, ring_bytes)
            if best is None or prediction.seconds < best.prediction.seconds:
                best = Plan(resident, ring_bytes, offsets, self._budget, prediction, self._limit)
                better = spread
            if prediction.seconds <= hoped or ring_bytes > TIGHT * largest:
                break
        else:
            if len(steps) > MANY:
                self._placing = (better,)
        return best

    def _ring_sizes(self, room: int) -> list[int]:
        """Sizes worth trying, each a multiple of `GRAIN`. The first always works where `room` is all there is."""
        if self._wish:
            return [self._wish]
        largest = self._nbytes[self._by_size[0]]
        sizes = [self._always, *(factor * largest for factor in (3, 4, 6)), *(room // part for part in (8, 4, 2))]
        # With the largest units resident a smaller ring is enough.
        sizes += [2 * self._nbytes[self._by_size[rank]] for rank in (len(self._by_size) // 32, len(self._by_size) // 8)]
        return list(dict.fromkeys(size // GRAIN * GRAIN for size in sizes if size <= room))

    def _changed(self, resident: frozenset[int], kept: frozenset[int]) -> list[frozenset[int]]:
        """With small changes, those that helped most first."""
        steps = max(1, len(self._workload.steps))

        def judge(chosen: frozenset[int]) -> float:
            if not self._few:
                return self._estimate(chosen)
            plan = self._played(chosen, None)
            return math.inf if plan is None else plan.prediction.seconds

        movable = [unit for unit in reversed(self._by_size) if unit not in kept]
        tries = STEPS_TO_IMPROVE // (steps * (FEW_COST if self._few else 1))
        heat = FEW_HEAT if self._few else HEAT
        return improve(resident, movable, judge, tries, heat, self._enough, jumps=self._few) if tries >= LEAST_TRIES else []
