"""Plans that hold when computing turns out quicker than it was measured.

Problem: what a leaf's computing takes is known as an upper bound only: a first pass warms up, others share the device, and of later
measurements the smaller counts. Where computing is the bottleneck many sets of residents take equally long, so the search takes any
of them, also one that keeps the link busy until the last millisecond; and as soon as computing is quicker, that one's link decides.
The ring, once there, keeps its size while a network is in use, so better measurements cannot take that back.

Method: such a plan is played with computing `HURRIED` to so much of what was measured. Where that takes notably longer than it must
(`core.floor`), a plan made for those times takes its place if by the times as measured it is as fast (`AS_FAST`). So nothing is paid for
it, and planning takes longer only where there is something to gain.

Pure; bytes and seconds; no torch. Callers: `learned`, and the command `plan`.
"""

from __future__ import annotations

from dataclasses import replace

from lib_async_lowvram.core.floor import floor_seconds
from lib_async_lowvram.core.pipeline import Workload, simulate
from lib_async_lowvram.core.plan import Plan, make_plan

HURRIED = (0.8, 0.9)
"""Shares of the measured compute times; the first whose plan costs nothing counts."""

AS_FAST = 0.002
"""Share of a pass."""

HELD_UP = 0.01
"""Share of the computing by which a pass must be longer for the link to be the bottleneck already."""

WORTH_A_SEARCH = 0.03
"""Share of the floor by which hurried passes must be longer for another plan to be looked for."""


def make_plan_with_slack(workload: Workload, budget_bytes: int, *, lookahead_bytes: int = 0, small_unit_bytes: int = 0) -> Plan:
    """See `core.plan.make_plan`; as fast by this workload's times, and fast still when computing takes less."""
    plan = make_plan(workload, budget_bytes, lookahead_bytes=lookahead_bytes, small_unit_bytes=small_unit_bytes)
    if not plan.ring_bytes or plan.prediction.stall_seconds > HELD_UP * workload.compute_seconds:
        return plan  # there is nothing to spare
    for share in HURRIED:
        hurried = replace(
            workload,
            steps=tuple((unit, seconds * share) for unit, seconds in workload.steps),
            lead_seconds=workload.lead_seconds * share,
        )
        if _near_the_floor(hurried, plan):
            break
        other = make_plan(hurried, budget_bytes, lookahead_bytes=lookahead_bytes, small_unit_bytes=small_unit_bytes)
        prediction = simulate(workload, other.resident, other.offsets, other.ring_bytes)
        if prediction.seconds <= plan.prediction.seconds * (1 + AS_FAST):
            return replace(other, prediction=prediction, limit_seconds=plan.limit_seconds)
    return plan


def _near_the_floor(workload: Workload, plan: Plan) -> bool:
    seconds = simulate(workload, plan.resident, plan.offsets, plan.ring_bytes).seconds
    hooks = workload.step_overhead_seconds * sum(unit not in plan.resident for unit, _ in workload.steps)
    return seconds <= (floor_seconds(workload, plan.budget_bytes) + hooks) * (1 + WORTH_A_SEARCH)
