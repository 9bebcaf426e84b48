"""What no schedule can beat: a lower bound on the time per pass that knows in which order weights are used.

Problem: the limit, max(compute, (weights - budget) / bandwidth), asks for a link that is never idle. But a device that is full has no
room for what comes next: while a stretch computes that is long and has few weights (the shallow blocks), copies stop, and what could have
travelled meanwhile has to travel later. So a plan may be as good as any and still miss the limit; this says by how much it must.

Bound: take any stretch of consecutive steps, over the end of a pass too, from the start of step i to the start of step j. Of the U bytes
that the units of steps i to j have, at most the budget B can be on the device when i starts, and all must have been when j starts: at least
U - B bytes are copied in between, whatever is kept, evicted or fetched again, and in whatever order. The other steps of the pass
compute as long as they compute. With C seconds of computing per pass, c of them from i's start to j's, and a link of w bytes per second:

    seconds per pass >= C - c + max(c, (U - B) / w)

Pure; bytes and seconds; no torch. Callers: `core.plan`, whose search may end near it, and the commands `plan` and `bench`, which show it.
"""

from __future__ import annotations

from collections import deque

from lib_async_lowvram.core.pipeline import Workload


def floor_seconds(workload: Workload, budget_bytes: int) -> float:
    """Seconds per pass that no schedule under this budget beats; at least the limit.

    `budget_bytes` is taken as it is; `make_plan` may have to raise it. A unit that fires more than once counts at its first firing only,
    which can make the bound lower, never false."""
    nbytes, must = workload.nbytes, workload.must_reside
    room = budget_bytes - workload.fixed_bytes - sum(nbytes[unit] for unit in must)
    counted = set(must)
    steps: list[tuple[float, float]] = []  # seconds of copying, of computing
    for unit, seconds in workload.steps:
        steps.append((0.0 if unit in counted else nbytes[unit] / workload.bandwidth, seconds))
        counted.add(unit)
    if steps:
        steps[-1] = (steps[-1][0], steps[-1][1] + workload.lead_seconds)  # what lies between two passes follows the last step
    return max(workload.limit_seconds(budget_bytes), workload.compute_seconds + _most_beyond(steps) - room / workload.bandwidth)


def _most_beyond(steps: list[tuple[float, float]]) -> float:
    """The most by which copying exceeds computing over a cyclic stretch of at most all `steps`, the computing of its last one left out.

    With sums K of copying before each step and S of computing, it is the largest K[j + 1] - S[j] - (K[i] - S[i]) with i <= j < i + n; the
    largest within each such window of j is kept in a queue, largest first, of those that no later one exceeds."""
    count = len(steps)
    copied = computed = most = 0.0
    starts: list[float] = []  # K[i] - S[i]
    ends: deque[tuple[int, float]] = deque()  # j, K[j + 1] - S[j]
    for j in range(2 * count):
        copy, seconds = steps[j % count]
        starts.append(copied - computed)
        copied += copy
        end = copied - computed
        computed += seconds
        while ends and ends[-1][1] <= end:
            ends.pop()
        ends.append((j, end))
        i = j - count + 1
        if i >= 0:
            while ends[0][0] < i:
                ends.popleft()
            most = max(most, ends[0][1] - starts[i])
    return most
