"""What a network learned, and the plan made of it: kept until the inputs differ, refined by later measurements.

Problem: planning a thousand units takes a tenth of a second, and a network is entered at every job; so a plan is kept as long
as everything that it was made from is the same. What a learning pass measured is refined by the passes timed after it; and
passes differ: another picture's size or batch computes for longer, under another plan. A network follows the shape that its
passes have had twice in a row (a prompt of another length makes every second pass another one), at once when it is entered.

Called by `network` and `streaming` under the mover's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.core.pipeline import simulate
from lib_async_lowvram.core.plan import Plan
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.leaf_clock import LeafClock
from lib_async_lowvram.learned import Learned
from lib_async_lowvram.log import logger
from lib_async_lowvram.measured import Measured

WORTHWHILE = 0.02
"""Share of a pass that another plan must be predicted to gain before a network in use changes over to it."""

PLANS = 6
"""Kept with what they were made from: a picture with hires fix needs two, and the same two again for the next one."""

SLOW_PASSES = 3
"""Sampled passes, each slower than stock's moves alone, after which the mover gives way."""

LESS, MORE = 16, 8
"""Parts of a budget by which it must have shrunk or grown before a network in use takes notice: the automatic one follows what is
free, which comes and goes."""


class Planning:
    """`name`: of the network, for the log.

    Attributes:
        learned: None before the learning pass. plan: the newest; None before the first.
        stale: the plan no longer fits what was learned or configured.
    """

    def __init__(self, name: str, measured: Measured) -> None:
        self._name = name
        self._measured = measured
        self._inputs: tuple | None = None  # of the present plan
        self._plans: deque[tuple[tuple, Plan]] = deque(maxlen=PLANS)
        self._clocks: list[tuple[Hashable, LeafClock]] = []
        self._shape: Hashable = None  # of the passes that are planned for
        self._once: Hashable = None  # another one, seen in the last pass
        self._sizes: tuple[int, ...] = ()
        self._slow = 0  # sampled passes in a row that were slower than stock's moves
        self.verdict = ""
        """Why stock would be faster, once that is certain."""
        self._times_of: Hashable = None  # the shape whose times `learned` holds
        self.learned: Learned | None = None
        self.plan: Plan | None = None
        self.stale = False
        self.most_bytes: int | None = None
        """A budget that was found to be too large for what is free; until the network is left, this is the most."""

    def forget(self) -> None:
        """The network is another one: learn anew."""
        self.learned = self.plan = self._inputs = None
        self._plans.clear()

    def learn(self, learned: Learned, units: Sequence[Unit]) -> None:
        """A learning pass is over, of the shape last told."""
        self.learned = learned
        self._sizes = tuple(unit.nbytes for unit in units)
        self._clocks.clear()
        self._times_of = self._shape
        self._recall()
        self.stale = True

    def reorder(self, streamed: Sequence[int]) -> None:
        """Streamed units fire in another order now."""
        # Units that are to be residents may be streaming for a last time (`changeover`).
        self.learned = self.learned.reordered(streamed, self.plan.resident.difference(streamed))

    @property
    def key(self) -> tuple[str, Hashable]:
        """Of the passes that are planned for, as `Activations` knows them."""
        return self._name.partition("#")[0], self._shape

    # -- which passes --------------------------------------------------------------------------------------------------
    def began(self, shape: Hashable, entering: bool) -> None:
        """A pass begins whose arguments have this shape (None: not known). `entering`: the network takes the device now."""
        if shape is None or shape == self._shape:
            self._once = None
        elif entering or self.learned is None or shape == self._once:
            self._shape, self._once = shape, None
            self._recall()
        else:
            self._once = shape

    def _recall(self) -> None:
        """Take up what is known of passes of this shape. The times of others, where nothing is, until one was timed."""
        known = self._measured.recall((self._sizes, self._shape)) if self.learned is not None else None
        recalled = self.learned if known is None else self.learned.timed(*known)
        if recalled is not self.learned:  # else they are of another order
            self.learned, self._times_of = recalled, self._shape

    @property
    def untimed(self) -> bool:
        """Whether passes like these have never been timed: then the next one should be."""
        return self._times_of != self._shape and not any(shape == self._shape for shape, _ in self._clocks)

    def timed(self, clock: LeafClock) -> None:
        """A complete pass was timed leaf by leaf; its figures are read when the device has got there."""
        self._clocks.append((self._once or self._shape, clock))
        del self._clocks[:-4]

    def _read_clocks(self) -> None:
        unread = []
        for shape, clock in self._clocks:
            figures = clock.read()
            if figures is None:
                unread.append((shape, clock))
                continue
            self._measured.copied(*clock.read_copies())
            if not clock.arriving:
                self._judge(clock.read_waits())
            if self.learned is not None and shape == self._shape:
                self.learned = self.learned.refined(*figures, known=self._times_of == shape)
                self._times_of = shape
                self._measured.remember((self._sizes, shape), self.learned.lead_seconds, self.learned.steps)
        self._clocks = unread
        if self.learned is not None:
            self.learned = self.learned.linked(self._measured.bandwidth)

    def _judge(self, waited_seconds: float) -> None:
        """A steady pass waited so long for copies. Stock would have waited for every weight, both ways."""
        stock = 2 * sum(self._sizes) / (self._measured.bandwidth or self.learned.bandwidth)
        self._slow = self._slow + 1 if waited_seconds > stock else 0
        if self._slow == SLOW_PASSES:
            self.verdict = (
                f"{self._name}: {SLOW_PASSES} sampled passes in a row waited {waited_seconds * 1e3:.0f} ms for copies, where stock's moves "
                f"would take {stock * 1e3:.0f} ms"
            )

    # -- plans ---------------------------------------------------------------------------------------------------------
    def least_budget(self, units: Sequence[Unit]) -> int:
        """Bytes; see `core.plan.least_budget`."""
        return self.learned.least_budget(units)

    def make(self, units: Sequence[Unit], budget_bytes: int, config: OffloadConfig) -> Plan:
        """The plan for this budget; tells units whether they are resident. Logs what is noteworthy, once."""
        self._read_clocks()
        budget_bytes = self._at_most(budget_bytes)
        inputs = self._all_inputs(units, budget_bytes, config)
        plan = next((plan for known, plan in self._plans if known == inputs), None)
        if plan is None:
            plan = self.learned.plan(units, budget_bytes, config.lookahead_bytes, config.small_leaf_bytes)
            self._plans.append((inputs, plan))
        self._inputs = inputs
        if self.plan is None or plan.notes != self.plan.notes:
            for note in plan.notes:
                logger.info("%s: %s", self._name, note)
        self.plan = plan
        for unit in units:
            unit.resident = unit.index in plan.resident
        self.stale = False
        return plan

    def _at_most(self, budget_bytes: int) -> int:
        return budget_bytes if self.most_bytes is None else min(budget_bytes, self.most_bytes)

    def _all_inputs(self, units: Sequence[Unit], budget_bytes: int, config: OffloadConfig) -> tuple:
        return budget_bytes, config, self.learned, tuple(unit.nbytes for unit in units)

    def better(self, units: Sequence[Unit], budget_bytes: int, config: OffloadConfig) -> Plan | None:
        """Between two passes in use: another plan with a ring of the same size, when the present one does not fit the budget any
        more, or when what was learned since then makes it notably better. It is the present one from then on; units are not
        told."""
        self._read_clocks()
        planned = self._inputs[0]
        budget_bytes = self._at_most(budget_bytes)
        if planned - planned // LESS <= budget_bytes <= planned + planned // MORE:
            budget_bytes = planned
        inputs = self._all_inputs(units, budget_bytes, config)
        if self._inputs == inputs or not self.plan.ring_bytes:
            return None
        workload = self.learned.workload(units)
        plan = self.learned.plan(units, budget_bytes, self.plan.ring_bytes, config.small_leaf_bytes)
        self._inputs = inputs
        too_much = budget_bytes < planned  # not the plan's own, which may have been raised to the least that works
        if plan.ring_bytes != self.plan.ring_bytes:
            self.stale = too_much  # then the next pass starts over
            return None
        if plan.resident == self.plan.resident:
            return None
        now = simulate(workload, self.plan.resident, self.plan.offsets, self.plan.ring_bytes)
        if not too_much and plan.prediction.seconds > (1 - WORTHWHILE) * now.seconds:
            return None
        self.plan = plan
        return plan

    def streamed_steps(self) -> Iterable[int]:
        """Units that the plan streams, as they fire."""
        return (unit for unit, _ in self.learned.steps if unit not in self.plan.resident)
