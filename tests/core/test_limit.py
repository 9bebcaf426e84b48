"""The limit really is one."""

from __future__ import annotations

from lib_async_lowvram.core.pipeline import Workload
from lib_async_lowvram.core.plan import make_plan


def test_the_limit_is_a_limit_where_units_do_not_fire():
    """Conditional units that did not fire need not be on the device: counting them would put the limit above what is reached."""
    load = Workload(steps=tuple((unit, 0.1) for unit in range(4)), nbytes=dict.fromkeys(range(40), 512), bandwidth=512.0)
    plan = make_plan(load, 8 * 512)
    assert plan.prediction.seconds >= plan.limit_seconds * (1 - 1e-9)
