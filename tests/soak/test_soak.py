"""Some jobs of some servers; `make soak` runs thousands."""

from __future__ import annotations

import pytest

from tests.lora_double import LoraDouble
from tests.soak.server import Server


@pytest.mark.parametrize("seed", range(6))
def test_a_server(seed: int) -> None:
    with LoraDouble() as lora:
        server = Server(1000 + seed, lora)
        for _ in range(8):
            server.job()
        assert server.passes >= 24
        server.close()
