"""What a pass is made of - each leaf's bytes and computing - and from that the best schedule.

Problem: the time per pass of the mover is to be judged against what could be reached at all under the same budget and link
(DESIGN.md, Words: best schedule). The mover plans from its learning pass, which runs cold and once; a judge must not rest on
what it judges. So this times every leaf of the *resident* model, over several passes, in the same run, and plays the
pipeline with those times.

Called on the thread that runs the model, between passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from torch import nn

from lib_async_lowvram.core.floor import floor_seconds
from lib_async_lowvram.core.pipeline import Workload
from lib_async_lowvram.core.plan import make_plan
from lib_async_lowvram.device.streams import Event, Streams, align


@dataclass(frozen=True)
class Profile:
    """One pass. `steps`: (leaf number, seconds from its start to the next leaf's) in order; `nbytes`: of each leaf, padded
    as on the device; `lead_seconds`: before the first leaf."""

    steps: tuple[tuple[int, float], ...]
    nbytes: tuple[int, ...]
    lead_seconds: float

    @property
    def seconds(self) -> float:
        return self.lead_seconds + sum(seconds for _, seconds in self.steps)

    def best_schedule_seconds(
        self, budget_bytes: int, bandwidth: float, compute_seconds: float, copy_overhead_seconds: float, small_unit_bytes: int
    ) -> float:
        """Seconds per pass of the best resident set and ring found for `budget_bytes` and `bandwidth` (bytes/s), with and
        without a preference for units below `small_unit_bytes`. `compute_seconds`: of a resident pass without the profile's
        hooks; the leaves' times are scaled to it."""
        workload = self._workload(bandwidth, compute_seconds, copy_overhead_seconds)
        plans = [make_plan(workload, budget_bytes, small_unit_bytes=small) for small in (0, small_unit_bytes)]
        return min(plan.prediction.seconds for plan in plans)

    def floor_seconds(self, budget_bytes: int, bandwidth: float, compute_seconds: float) -> float:
        """Seconds per pass that no schedule beats (`core.floor`); otherwise as above."""
        return floor_seconds(self._workload(bandwidth, compute_seconds, 0.0), budget_bytes)

    def _workload(self, bandwidth: float, compute_seconds: float, copy_overhead_seconds: float) -> Workload:
        scale = compute_seconds / self.seconds
        return Workload(
            steps=tuple((leaf, seconds * scale) for leaf, seconds in self.steps),
            nbytes=dict(enumerate(self.nbytes)),
            bandwidth=bandwidth,
            copy_overhead_seconds=copy_overhead_seconds,
            lead_seconds=self.lead_seconds * scale,
        )


def profile(model: nn.Module, streams: Streams, passes: Sequence[Callable[[], object]]) -> Profile:
    """Run `passes`, each one pass of `model` with everything resident, and take the median of each leaf's times.

    Raises `ValueError` when the passes do not run the same leaves in the same order.
    """
    leaves = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    numbers = {leaf: number for number, leaf in enumerate(leaves)}
    marks: list[tuple[int, Event]] = []

    def mark(number: int) -> None:
        marks.append((number, streams.record(streams.current_stream(), timing=True)))

    hooks = [leaf.register_forward_pre_hook(lambda leaf, args: mark(numbers[leaf])) for leaf in leaves]
    timed: list[list[tuple[int, float]]] = []
    try:
        for run in passes:
            marks.clear()
            mark(-1)
            run()
            mark(-1)
            streams.synchronize(marks[-1][1])
            timed.append([(number, streams.elapsed(start, end)) for (number, start), (_, end) in zip(marks, marks[1:], strict=False)])
    finally:
        for hook in hooks:
            hook.remove()
    orders = {tuple(number for number, _ in steps) for steps in timed}
    if len(orders) != 1:
        raise ValueError("the passes did not run the same leaves in the same order")
    lead, *steps = [(number, median(steps[place][1] for steps in timed)) for place, (number, _) in enumerate(timed[0])]
    nbytes = tuple(align(sum(p.numel() * p.element_size() for p in leaf.parameters(recurse=False))) for leaf in leaves)
    return Profile(tuple(steps), nbytes, lead[1])
