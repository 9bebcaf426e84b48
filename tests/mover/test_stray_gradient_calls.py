"""A leaf called on its own with gradients on, outside any pass: the host's API threads do that to the token embedding.

Nobody announces such a call, so the leaf's own hook starts it, and what is moved must include that very leaf.
"""

from __future__ import annotations

import pytest
import torch

from tests.mover.chains import Chain, X, attached, judged, on_thread, pair, recorded, same
from tests.mover.zoo import every_budget


@every_budget
@pytest.mark.parametrize("place", [0, 3, 5])
@pytest.mark.parametrize(("drained", "elsewhere"), [(True, False), (False, False), (True, True)])
def test_the_leaf_that_starts_it_is_on_the_device(budget: int, place: int, drained: bool, elsewhere: bool) -> None:
    net, twin = pair(Chain)
    streams = recorded()
    mover = attached(net, streams, budget)
    if drained:
        mover.drain()

    def stray() -> None:
        with judged(streams), torch.enable_grad():
            assert torch.equal(net.leaves[place](X), twin.leaves[place](X))

    before = mover.status()["placement_faults"]
    for _ in range(2):
        on_thread(stray) if elsewhere else stray()
    assert mover.status()["placement_faults"] == before == 0, mover.status()["last_error"]
    for _ in range(2):
        same(net, twin, streams)
    assert mover.status()["placement_faults"] == 0
    assert mover.status()["write_backs"] == mover.status()["adopted"] == 0
    mover.drain()
    assert streams.allocated_bytes == 0
    streams.check()
