"""What is said to be needed, against runs on shapes alone; and groups that fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_async_lowvram.bench.shapes import Shape, sd15_shape, sdxl_shape
from lib_async_lowvram.bench.unet import empty_unet
from lib_async_lowvram.large.chunks import in_chunks
from lib_async_lowvram.large.memory import Kept, group, kept
from tests.large.shape_run import peak_bytes

MB = 1 << 20


def measured(shape: Shape, side: int, batch: int, chunks: int) -> tuple[int, int]:
    """(peak bytes of a run on shapes in float16, what the formula says)"""
    unet = empty_unet(shape, torch.float16)
    x = torch.empty(batch, 4, side, side, device="meta", dtype=torch.float16)
    times = torch.empty(batch, device="meta")
    given = [torch.empty(batch, 77, shape.context, device="meta", dtype=torch.float16)]
    if shape.label:
        given.append(torch.empty(batch, shape.label, device="meta", dtype=torch.float16))

    def run() -> None:
        with in_chunks(unet, chunks):
            unet(x, times, *given)

    need = kept(unet, 2)
    said = batch * need.held_bytes(side, side) + -(-batch // chunks) * need.inside_bytes(side, side)
    return peak_bytes(run, x, times, *given, *unet.parameters()), said


@pytest.mark.parametrize(("side", "batch", "chunks"), [(64, 1, 1), (64, 25, 25), (96, 9, 9), (64, 12, 3), (256, 1, 1)])
def test_sd15_in_half_precision(side: int, batch: int, chunks: int) -> None:
    peak, said = measured(sd15_shape(320), side, batch, chunks)
    assert peak <= said <= 1.15 * peak, (peak / MB, said / MB)


@pytest.mark.parametrize(("side", "batch", "chunks"), [(64, 1, 1), (128, 5, 5), (128, 6, 3)])
def test_sdxl_needs_no_more_than_is_said(side: int, batch: int, chunks: int) -> None:
    peak, said = measured(sdxl_shape(320), side, batch, chunks)  # its first level has no attention: less inside
    assert peak <= said <= 2 * peak, (peak / MB, said / MB)


def test_sd15_s_figures() -> None:
    need = kept(empty_unet(sd15_shape(320)), 2)
    assert need == Kept(8.0 * 320, 22.0 * 320, 8, 2)
    assert need.held_bytes(64, 64) == 2560 * 64 * 64 * 2


def test_other_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no input_blocks"):
        kept(nn.Linear(2, 2), 2)


NEED = Kept(2560.0, 7040.0, 8, 2)


def test_2048_in_800_mb() -> None:
    """The conditions apart, as under a tight budget: nine tiles of 768 in one call, beside the least budget for weights (118 MB)."""
    found = group(NEED, 9, 1, 96, 96, (800 - 118) * MB)
    assert (found.pieces, found.calls) == (9, 1)
    assert found.needed_bytes <= (800 - 118) * MB
    both = group(NEED, 9, 2, 96, 96, (800 - 118) * MB)
    assert (both.pieces, both.calls) == (5, 2)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 128), st.integers(0, 1 << 34))
def test_groups_fit_and_are_as_equal_as_may_be(pieces: int, batch: int, side: int, free: int) -> None:
    found = group(NEED, pieces, batch, side, side, free)
    assert 1 <= found.pieces <= pieces and 1 <= found.chunks <= found.pieces * batch
    assert (found.calls - 1) * found.pieces < pieces <= found.calls * found.pieces
    one = NEED.held_bytes(side, side) * batch + NEED.inside_bytes(side, side)
    if one <= free:
        assert found.needed_bytes <= free
        larger = found.calls > 1 and -(-pieces // (found.calls - 1))
        assert not larger or larger * batch * NEED.held_bytes(side, side) + NEED.inside_bytes(side, side) > free
    else:
        assert found.pieces == 1 and found.chunks == batch


def test_much_memory_is_one_call_in_one_chunk() -> None:
    assert group(NEED, 9, 2, 96, 96, 1 << 40).chunks == 1
