"""What one learning pass taught about a network, and the plans that follow from it for a given budget.

Between what `region_pass` observed (modules, in order, with times) and what `core.plan` needs (units, bytes, seconds).
Called by `network` under the mover's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib_async_lowvram.core.pipeline import Workload
from lib_async_lowvram.core.plan import Plan, least_budget
from lib_async_lowvram.core.slack import make_plan_with_slack
from lib_async_lowvram.device.streams import align
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.region_pass import Observed

COPY_OVERHEAD_SECONDS = 8e-6
"""Per copy, whatever its size: what enqueuing and starting a DMA copy takes on current hosts (shared/plan_reference)."""

IN_STEP_SECONDS = 60e-6
"""Per acquire and release on a device that computes in step with the host: 7 us of our hooks (`bench overhead`), and what the turns of
the simulated copy engine take from the thread that computes (60 to 120 us in all, `bench`; plans made with 20 to 150 us take
equally long)."""

HEADROOM, PAGE = 512, 4096

NOTEWORTHY = 0.05
"""Share of the compute time per pass."""


@dataclass(frozen=True)
class Learned:
    """One pass of a network.

    Attributes:
        steps: (unit index, seconds from its start to the next unit's) per firing, in order.
        lead_seconds: computing before the first unit fires.
        bandwidth: host to device as measured in the learning pass, bytes per second.
        first: unit index -> place of its first firing in `steps`.
        buffer_bytes: device bytes of loose tensors.
        in_step: the device computes in step with the host (the simulated one).
    """

    steps: tuple[tuple[int, float], ...]
    lead_seconds: float
    bandwidth: float
    first: dict[int, int]
    buffer_bytes: int
    in_step: bool = False

    @classmethod
    def of(cls, observed: Observed, units: Sequence[Unit], announced: frozenset[int], buffer_bytes: int, in_step: bool) -> Learned:
        """Give what was computed between two units' starts to the first of them."""
        by_anchor = {id(unit.anchor()): unit.index for unit in units if unit.index in announced}
        steps: list[list] = []
        lead = 0.0
        for module, seconds in observed.firings:
            index = by_anchor.get(module)
            if index is not None:
                steps.append([index, seconds])
            elif steps:
                steps[-1][1] += seconds
            else:
                lead += seconds
        first: dict[int, int] = {}
        for place, (index, _) in enumerate(steps):
            first.setdefault(index, place)
        # Nothing to move means no measurement and nothing to stream either: any rate will do.
        rate = observed.bandwidth or 1e12
        return cls(tuple((index, seconds) for index, seconds in steps), lead, rate, first, buffer_bytes, in_step)

    @property
    def compute_seconds(self) -> float:
        """Seconds per pass with everything resident, as the learning pass saw it."""
        return self.lead_seconds + sum(seconds for _, seconds in self.steps)

    def refined(self, lead_seconds: float, steps: Sequence[tuple[int, float]], known: bool = True) -> Learned:
        """With a later pass's times taken into account. `known`: the times here are of such passes, so that of two measurements
        the smaller one counts; else they are of passes of another size, and give way. Unchanged when that would make less than a
        `NOTEWORTHY` difference, since other times mean another plan.

        Residents have no hooks once they have arrived: then what was measured from one streamed unit to the next is shared out
        over all that fire between the two, in proportion to the times here. A pass that fired other units says nothing.
        """
        fresh = self._shared_out(lead_seconds, steps)
        if fresh is None:
            return self
        if known:
            fresh = replace(
                fresh,
                steps=tuple((unit, min(old, new)) for (unit, old), (_, new) in zip(self.steps, fresh.steps, strict=True)),
                lead_seconds=min(self.lead_seconds, fresh.lead_seconds),
            )
        return fresh if abs(fresh.compute_seconds - self.compute_seconds) > NOTEWORTHY * self.compute_seconds else self

    def _shared_out(self, lead_seconds: float, seen: Sequence[tuple[int, float]]) -> Learned | None:
        """With the times of a pass in which only some firings were seen, in this order. None when it is another order."""
        parts: list[list] = [[lead_seconds, []]]  # (seconds, places in `steps` that share them)
        place = 0
        for unit, seconds in seen:
            while place < len(self.steps) and self.steps[place][0] != unit:
                parts[-1][1].append(place)
                place += 1
            if place == len(self.steps):
                return None
            parts.append([seconds, [place]])
            place += 1
        parts[-1][1].extend(range(place, len(self.steps)))
        times = [0.0] * len(self.steps)
        lead = lead_seconds
        for number, (seconds, places) in enumerate(parts):
            before = 0.0 if number else self.lead_seconds
            whole = before + sum(self.steps[each][1] for each in places)
            if not number:
                lead = seconds * before / whole if whole else seconds
            for each in places:
                times[each] = seconds * self.steps[each][1] / whole if whole else seconds / len(places)
        return replace(self, lead_seconds=lead, steps=tuple((unit, times[each]) for each, (unit, _) in enumerate(self.steps)))

    def timed(self, lead_seconds: float, steps: tuple[tuple[int, float], ...]) -> Learned:
        """With these times, where they are of the same firings; else unchanged."""
        if [unit for unit, _ in steps] != [unit for unit, _ in self.steps]:
            return self
        return replace(self, lead_seconds=lead_seconds, steps=steps)

    def linked(self, bandwidth: float | None) -> Learned:
        """With another bandwidth, bytes per second, when it is notably another."""
        if bandwidth is None or abs(bandwidth - self.bandwidth) <= NOTEWORTHY * self.bandwidth:
            return self
        return replace(self, bandwidth=bandwidth)

    def reordered(self, streamed: Sequence[int], resident: frozenset[int]) -> Learned:
        """With another order of the streamed units, as later passes fired them. Residents, which nobody sees fire, stay
        behind the streamed unit that they followed; those of a unit that no longer fires go to the end."""
        seconds: dict[int, float] = {}
        followers: dict[int, list[tuple[int, float]]] = {}
        steps: list[tuple[int, float]] = []
        current = steps  # residents before the first streamed unit
        for unit, time in self.steps:
            if unit in resident:
                current.append((unit, time))
            else:
                seconds.setdefault(unit, time)
                current = followers.setdefault(unit, [])
        for unit in streamed:
            steps.append((unit, seconds.get(unit, 0.0)))
            steps.extend(followers.pop(unit, ()))
        for left in followers.values():
            steps.extend(left)
        first: dict[int, int] = {}
        for place, (unit, _) in enumerate(steps):
            first.setdefault(unit, place)
        return replace(self, steps=tuple(steps), first=first)

    def workload(self, units: Sequence[Unit]) -> Workload:
        """The pass as numbers for the planner."""
        return Workload(
            steps=self.steps,
            nbytes={unit.index: align(unit.nbytes) for unit in units},
            bandwidth=self.bandwidth,
            must_reside=frozenset(unit.index for unit in units if unit.must_reside),
            fixed_bytes=self.buffer_bytes,
            copy_overhead_seconds=COPY_OVERHEAD_SECONDS,
            step_overhead_seconds=IN_STEP_SECONDS if self.in_step else 0.0,
            lead_seconds=self.lead_seconds,
        )

    def least_budget(self, units: Sequence[Unit]) -> int:
        """Bytes; see `core.plan.least_budget`."""
        return least_budget(self.workload(units))

    def plan(self, units: Sequence[Unit], budget_bytes: int, lookahead_bytes: int, small_unit_bytes: int) -> Plan:
        """See `core.slack`. One part in `HEADROOM` of the budget stays free where it can: until the next plan, residents may
        grow (LoRA adds biases)."""
        load = self.workload(units)
        spare = budget_bytes // HEADROOM // PAGE * PAGE
        if load.total_bytes <= budget_bytes or budget_bytes - spare < least_budget(load):
            spare = 0
        plan = make_plan_with_slack(load, budget_bytes - spare, lookahead_bytes=lookahead_bytes, small_unit_bytes=small_unit_bytes)
        return replace(plan, budget_bytes=plan.budget_bytes + spare)
