"""Slices of attention by free memory: as many as under stock, whatever the automatic budget takes."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.context import Context
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.webui.attention import DOGGETTX, INVOKEAI, SUB_QUADRATIC, SliceKeeper, first_attention, slicing

MIB = 1 << 20


class Downsample(nn.Module):
    pass


class Attention(nn.Module):
    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)


class Unet(nn.Module):
    """SD1.5 has attention on its first level, SDXL below it."""

    def __init__(self, heads: int, channels: int, levels_down: int, block_megabytes: int = 130) -> None:
        super().__init__()
        heavy = nn.Linear(1, block_megabytes * MIB // 2, bias=False)
        blocks = [heavy, *(Downsample() for _ in range(levels_down)), nn.Sequential(nn.Identity(), Attention(heads, channels))]
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = Attention(heads, 2 * channels)
        self.output_blocks = nn.ModuleList()


SD15, SDXL = (8, 320, 0), (10, 640, 1)


@pytest.fixture(scope="module", params=[SD15, SDXL], ids=["sd15", "sdxl"])
def shape(request):
    return request.param


@pytest.fixture(scope="module")
def unet(shape):
    with torch.device("meta"):
        built = Unet(*shape).half()
    return built.to_empty(device="cpu")


@pytest.fixture
def host(monkeypatch, unet):
    def use(method: str, upcast: bool = False, threshold: float | None = None) -> SliceKeeper:
        hijack = types.SimpleNamespace(model_hijack=types.SimpleNamespace(optimization_method=method))
        monkeypatch.setitem(sys.modules, "modules.sd_hijack", hijack)
        shared = types.SimpleNamespace(
            opts=types.SimpleNamespace(upcast_attn=upcast), cmd_opts=types.SimpleNamespace(sub_quad_chunk_threshold=threshold)
        )
        model = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=unet))
        models = types.SimpleNamespace(model_data=types.SimpleNamespace(sd_model=model))
        return SliceKeeper(shared, models)

    return use


def matrix_bytes(shape, batch, side, value):
    heads, _, levels = shape
    tokens = math.ceil(side / 2**levels) ** 2
    return batch * heads * tokens**2 * value


def slices(method: str, matrix: int, free: float, value: int) -> int:
    """The host's rule, in our own words; 0 for sub-quadratic in chunks."""
    if method == DOGGETTX:
        required = matrix * (3 if value == 2 else 2.5)
        return 1 if required <= free else 2 ** math.ceil(math.log(required / free, 2))
    if method == INVOKEAI:
        size, most = matrix // MIB, free / 3.3 / MIB
        return 1 if size <= most else 1 << int((size - 1) / most).bit_length()
    return 1 if matrix <= 0.7 * free else 0


METHODS = [DOGGETTX, INVOKEAI, SUB_QUADRATIC]


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_as_many_slices_as_stock(host, shape, method, upcast):
    """Under a faked free-memory function: what is free without weights, less ours or less stock's block, less what else lives."""
    keeper = host(method, upcast)
    value = 4 if upcast else 2

    @given(room=st.integers(1500, 11000), side=st.sampled_from([48, 64, 72, 96, 128, 160, 192]), batch=st.integers(1, 4))
    def judge(room, side, batch):
        streams = SimulatedStreams(capacity_bytes=1)
        streams.free_memory = lambda: room * MIB
        context = Context(streams, HostMemory(streams), OffloadConfig(reserve_bytes=0))
        shapes = ((batch, 4, side, side), (batch,))
        context.keep_free = keeper
        budget = context.budget(("unet", shapes))
        streams.close()
        matrix = matrix_bytes(shape, batch, side, value)
        others = 2 * batch * side * side * shape[1] * value  # a few tensors of full width
        stock = slices(method, matrix, room * MIB - 130 * MIB, value)
        assume(budget > 0)  # else even the least budget is more than what stock's slices leave
        assert slices(method, matrix, room * MIB - budget - others, value) == stock

    judge()


def test_where_nothing_is_sliced_nothing_is_kept(host, unet, shape):
    shapes = ((2, 4, 64, 64),)
    for method in ("sdp-no-mem", "sdp", "xformers", "V1", ""):
        assert host(method)("unet", shapes, 8 << 30) == 0
        assert slicing() == ""
    keeper = host(DOGGETTX)
    assert keeper("unet", shapes, 8 << 30) > 0
    assert keeper("vae_decode", None, 8 << 30) == keeper("text", ((1, 77),), 8 << 30) == keeper("unet", None, 8 << 30) == 0
    assert host(SUB_QUADRATIC, threshold=0)("unet", shapes, 8 << 30) == 0
    assert first_attention(unet) == (shape[0], shape[1], 2 ** shape[2])


def test_the_method_that_slices(host):
    host(DOGGETTX)
    assert slicing() == DOGGETTX


def test_a_model_that_cannot_be_read_costs_a_line_in_the_log(host, unet, caplog, monkeypatch):
    keeper = host(DOGGETTX)
    monkeypatch.setattr(unet.middle_block, "parameters", None)
    assert keeper("unet", ((2, 4, 64, 64),), 8 << 30) == 0
    assert keeper("unet", ((2, 4, 64, 64),), 8 << 30) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
