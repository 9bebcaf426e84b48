"""What a network learned, and the plan made of it: kept until the inputs differ, refined by later measurements.

Problem: planning a thousand units takes a good part of a second, and a network is entered at every job; so a plan is kept as
long as everything that it was made from is the same. What a learning pass measured is refined by the passes timed after it.

Called by `network` under the mover's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.core.plan import Plan
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.leaf_clock import LeafClock
from lib_async_lowvram.learned import Learned
from lib_async_lowvram.log import logger


class Planning:
    """`name`: of the network, for the log.

    Attributes:
        learned: None before the learning pass. plan: the newest; None before the first.
        stale: the plan no longer fits what was learned or configured.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._inputs: tuple | None = None
        self._clocks: list[LeafClock] = []
        self.learned: Learned | None = None
        self.plan: Plan | None = None
        self.stale = False

    def forget(self) -> None:
        """The network is another one: learn anew."""
        self.learned = self.plan = self._inputs = None

    def learn(self, learned: Learned) -> None:
        """A learning pass is over."""
        self.learned = learned
        self._clocks.clear()
        self.stale = True

    def reorder(self, streamed: Sequence[int]) -> None:
        """Streamed units fire in another order now."""
        self.learned = self.learned.reordered(streamed, self.plan.resident)

    def timed(self, clock: LeafClock) -> None:
        """A complete pass was timed leaf by leaf; its figures are read when the device has got there."""
        self._clocks.append(clock)
        del self._clocks[:-4]

    def _read_clocks(self) -> None:
        unread = []
        for clock in self._clocks:
            figures = clock.read()
            if figures is None:
                unread.append(clock)
            elif self.learned is not None:
                self.learned = self.learned.refined(*figures)
        self._clocks = unread

    def least_budget(self, units: Sequence[Unit]) -> int:
        """Bytes; see `core.plan.least_budget`."""
        return self.learned.least_budget(units)

    def make(self, units: Sequence[Unit], budget_bytes: int, config: OffloadConfig) -> Plan:
        """The plan for this budget; tells units whether they are resident. Logs what is noteworthy, once."""
        self._read_clocks()
        inputs = (budget_bytes, config, self.learned, tuple(unit.nbytes for unit in units))
        if self._inputs == inputs:
            plan = self.plan
        else:
            plan = self.learned.plan(units, budget_bytes, config.lookahead_bytes, config.small_leaf_bytes)
            self._inputs = inputs
        if self.plan is None or plan.notes != self.plan.notes:
            for note in plan.notes:
                logger.info("%s: %s", self._name, note)
        self.plan = plan
        for unit in units:
            unit.resident = unit.index in plan.resident
        self.stale = False
        return plan

    def streamed_steps(self) -> Iterable[int]:
        """Units that the plan streams, as they fire."""
        return (unit for unit, _ in self.learned.steps if unit not in self.plan.resident)
