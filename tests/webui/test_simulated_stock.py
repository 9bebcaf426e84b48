"""Stock's moves on the simulated device: a block waits for the one before it to leave and for itself to come; not when it is there."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from lib_async_lowvram.webui.simulated_stock import StocksMoves


@pytest.fixture
def unet(webui):
    return tiny_models.make("sd1").model.diffusion_model


def size(block) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())


def test_each_turn_costs_both_copies(unet, monkeypatch) -> None:
    monkeypatch.setenv("ASYNC_LOWVRAM_SIM_BANDWIDTH", "1e6")
    monkeypatch.setenv("ASYNC_LOWVRAM_SIM_LATENCY", "0.5")
    slept: list[float] = []
    first, second = unet.input_blocks[0], unet.input_blocks[1]
    with StocksMoves(unet, slept.append):
        for block in (first, first, second, first):
            for hook in list(block._forward_pre_hooks.values())[-1:]:
                hook(block, ())
    both = (size(first) + size(second)) / 1e6 + 1.0
    assert slept == pytest.approx([size(first) / 1e6 + 0.5, both, both])


def test_the_hooks_are_gone_afterwards(unet) -> None:
    before = [dict(block._forward_pre_hooks) for block in unet.modules()]
    with pytest.raises(KeyboardInterrupt), StocksMoves(unet, lambda seconds: None), torch.no_grad():
        raise KeyboardInterrupt
    assert [dict(block._forward_pre_hooks) for block in unet.modules()] == before
