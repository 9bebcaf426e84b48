"""The most weight bytes on the device, of each network and in all."""

from __future__ import annotations

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from tests.mover.chains import LEAF_BYTES, Chain, call, simulated


def test_each_network_has_its_own() -> None:
    streams = simulated()
    small, large = Chain(3), Chain(6)
    with AsyncModelMover(OffloadConfig(budget_bytes=4 * LEAF_BYTES, small_leaf_bytes=0), streams) as mover:
        mover.attach({"small": small, "large": large})
        for _ in range(3):
            call(small, streams)
            call(large, streams)
        status = mover.status()
        networks = status["networks"]
        # The learning pass held all three; six, too: a plain module's is moved as a whole while that is small.
        assert networks["small"]["peak_weight_bytes"] == 3 * LEAF_BYTES
        assert networks["large"]["peak_weight_bytes"] == status["learning_peak_bytes"] == 6 * LEAF_BYTES
        assert status["peak_weight_bytes"] <= 4 * LEAF_BYTES
        assert networks["large"]["peak_activation_bytes"] is None  # nobody counts them here
        assert networks["large"]["pinned_bytes"] == networks["large"]["weight_bytes"] == 6 * LEAF_BYTES
        mover.detach(["large"])
        assert list(mover.status()["networks"]) == ["small"]
        mover.attach({"large": large})
        assert mover.status()["networks"]["large"]["peak_weight_bytes"] == 0  # counted anew
