"""What diffusers' UNet is said to need, against runs on shapes alone, whole and in chunks of its parts."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from lib_async_lowvram.large import chunks
from lib_async_lowvram.large.diffusers_unet import kept
from lib_async_lowvram.standalone.families import SD15, SDXL, Family
from lib_async_lowvram.standalone.networks import chunk_roots
from tests.large.shape_run import peak_bytes
from tests.standalone.tiny import TINY_SD15, TINY_SDXL


def unet_of(family: Family, dtype: torch.dtype = torch.float16) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**family.unet).to(dtype).eval().requires_grad_(False)


def inputs(family: Family, batch: int, side: int, device: str, dtype: torch.dtype) -> tuple[tuple, dict]:
    def random(*shape: int) -> torch.Tensor:
        if device == "meta":
            return torch.empty(shape, device=device, dtype=dtype)
        return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))

    given = {"encoder_hidden_states": random(batch, 77, family.unet["cross_attention_dim"]), "return_dict": False}
    if family.text_time:
        width = family.unet["projection_class_embeddings_input_dim"] - 6 * family.unet["addition_time_embed_dim"]
        given["added_cond_kwargs"] = {"text_embeds": random(batch, width), "time_ids": random(batch, 6)}
    return (random(batch, 4, side, side), torch.tensor(500, device=device)), given


def in_chunks(unet: nn.Module, number: int) -> ExitStack:
    stack = ExitStack()
    for root in chunk_roots(unet):
        stack.enter_context(chunks.in_chunks(root, number, chunks.automatic_limit(unet)))
    return stack


def measured(family: Family, side: int, batch: int, number: int) -> tuple[int, int]:
    """(peak bytes of a run on shapes in float16, what the formula says)"""
    unet = unet_of(family)
    given, more = inputs(family, batch, side, "meta", torch.float16)
    conditions = [value for value in (more["encoder_hidden_states"], *more.get("added_cond_kwargs", {}).values())]

    def run() -> None:
        with torch.no_grad(), in_chunks(unet, number):
            unet(*given, **more)

    need = kept(unet, 2)
    said = batch * need.held_bytes(side, side) + -(-batch // number) * need.inside_bytes(side, side)
    return peak_bytes(run, *given, *conditions, *unet.parameters()), said


@pytest.mark.parametrize(("side", "batch", "number"), [(64, 1, 1), (64, 24, 24), (96, 8, 8), (64, 12, 3)])
def test_sd15(side: int, batch: int, number: int) -> None:
    peak, said = measured(SD15, side, batch, number)
    assert peak <= said <= 1.3 * peak, (peak >> 20, said >> 20)


@pytest.mark.parametrize(("side", "batch", "number"), [(128, 1, 1), (128, 6, 3)])
def test_sdxl(side: int, batch: int, number: int) -> None:
    peak, said = measured(SDXL, side, batch, number)  # its first level has no attention: less inside
    assert peak <= said <= 2.2 * peak, (peak >> 20, said >> 20)


def test_sd15_s_figures() -> None:
    need = kept(unet_of(SD15), 2)
    assert (need.held, need.inside, need.floor) == (9 * 320, 22 * 320, 8)


def test_other_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no conv_in, down_blocks"):
        kept(nn.Linear(2, 2), 2)


@torch.no_grad()
@pytest.mark.parametrize("family", [TINY_SD15, TINY_SDXL], ids=lambda family: family.name)
@pytest.mark.parametrize("number", [2, 3, 6])
def test_chunks_compute_the_same(family: Family, number: int) -> None:
    unet = unet_of(family, torch.float32).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(2)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.05, generator=generator)
    given, more = inputs(family, 6, 16, "cpu", torch.float32)
    expected = unet(*given, **more)[0]
    forwards = [module.forward for module in unet.modules()]
    with in_chunks(unet, number):
        found = unet(*given, **more)[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert [module.forward for module in unet.modules()] == forwards


@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda family: family.name)
def test_parts_hold_nearly_all_weights(family: Family) -> None:
    """What is in no part is used with the whole batch, and lies on the device for a whole learning pass."""
    unet = unet_of(family)
    limit = chunks.automatic_limit(unet)
    parts = [part for root in chunk_roots(unet) for part in chunks.parts(root, limit)]
    inside = {parameter for part in parts for parameter in part.parameters()}
    outside = sum(parameter.numel() for parameter in unet.parameters() if parameter not in inside)
    assert outside < 0.01 * sum(parameter.numel() for parameter in unet.parameters())
