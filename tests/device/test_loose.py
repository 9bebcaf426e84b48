"""Loose tensors: buffers and what cannot be packed go to the device and come back, with whatever happened to them there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lib_async_lowvram.device.loose import LooseTensors, loose_bytes
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.use_logger import UseLogger


@pytest.fixture
def streams() -> Iterator[SimulatedStreams]:
    made = SimulatedStreams(capacity_bytes=1 << 16, bandwidth=1e12, latency=0.0)
    yield made
    made.close()


class Holder(nn.Module):
    """Tensors as buffers, and one packable parameter."""

    def __init__(self, **buffers: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_buffers_move_and_keep_their_identity(streams: SimulatedStreams) -> None:
    module = Holder(a=torch.arange(6).view(2, 3).t(), b=torch.randn(4).half(), nothing=None, empty=torch.empty(0))
    objects, values = dict(module._buffers), {name: b.clone() for name, b in module.named_buffers()}
    where, weight = module.a.data_ptr(), module.weight.data_ptr()
    loose = LooseTensors(streams, [module])
    assert streams.owns(module.a.data_ptr())
    assert module.a.stride() == (1, 3)
    assert module.weight.data_ptr() == weight
    assert streams.allocated_bytes == 1024 == loose_bytes([module])
    for name, value in values.items():
        assert module._buffers[name] is objects[name]
        assert torch.equal(module._buffers[name], value)
    loose.leave()
    loose.leave()
    assert streams.allocated_bytes == 0
    assert module.a.data_ptr() == where
    assert all(module._buffers[name] is objects[name] for name in values)
    assert {host.data_ptr() for host in loose.host_tensors()} == set()


def test_one_tensor_in_two_places_moves_once(streams: SimulatedStreams) -> None:
    buffer = torch.randn(3)
    one, other = Holder(a=buffer), Holder(b=buffer)
    loose = LooseTensors(streams, [one, other])
    assert one.a is other.b is buffer
    assert streams.allocated_bytes == 512
    loose.leave()
    assert streams.allocated_bytes == 0


def write(module: Holder) -> None:
    module.a.add_(1)


def replace(module: Holder) -> None:
    module.a = module.a + 1


def replace_by_a_view(module: Holder) -> None:
    module.a = module.a[:2]


def shorten(module: Holder) -> None:
    module.a.data = module.a.data[:2]


def assign(module: Holder) -> None:
    module.a.data = module.a.data + 1


def turn(module: Holder) -> None:
    module.a.data = module.a.data.view(2, 2).t()


def remove(module: Holder) -> None:
    module.a = None


def nothing(module: Holder) -> None:
    pass


IN_INFERENCE_MODE = [nothing, write, replace, replace_by_a_view, remove]
"""Nobody can assign to the data of a tensor born there outside of that mode."""


@pytest.mark.parametrize(
    ("act", "inference"),
    [*((act, False) for act in (*IN_INFERENCE_MODE, shorten, assign, turn)), *((act, True) for act in IN_INFERENCE_MODE)],
)
def test_what_happened_on_the_device_is_kept(act: Callable[[Holder], None], inference: bool) -> None:
    inner = SimulatedStreams(capacity_bytes=1 << 16, bandwidth=1e12, latency=0.0)
    streams = RecordingStreams(inner)
    with torch.inference_mode(inference):
        module, twin = Holder(a=torch.arange(4.0)), Holder(a=torch.arange(4.0))
    loose = LooseTensors(streams, [module])
    with torch.inference_mode(inference), UseLogger(streams):
        act(module)
    with torch.inference_mode(inference):
        act(twin)
    loose.leave()
    if twin.a is None:
        assert module.a is None
    else:
        assert torch.equal(module.a, twin.a)
        assert module.a.stride() == twin.a.stride()
        assert not inner.owns(module.a.data_ptr())
    streams.check()
    assert inner.allocated_bytes == 0
    inner.close()


def test_only_changed_ones_are_copied_back(streams: SimulatedStreams) -> None:
    module = Holder(a=torch.arange(4.0), b=torch.arange(4.0))
    loose = LooseTensors(streams, [module])
    module.a.add_(1)
    loose.leave()
    assert streams.offload_stream.copies == 1
    assert module.a.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_parameters_nobody_can_pack_move_too(streams: SimulatedStreams) -> None:
    with torch.inference_mode():
        born = Holder()
    torn = Holder()
    parameter, where = born.weight, torn.weight.data_ptr()
    loose = LooseTensors(streams, [born, torn], unmanaged=[torn])
    assert streams.owns(born.weight.data_ptr())
    assert isinstance(born.weight, nn.Parameter)
    assert streams.owns(torn.weight.data_ptr())
    assert torch.equal(born.weight, parameter)
    loose.leave()
    assert born.weight is parameter
    assert torn.weight.data_ptr() == where


def test_meta_tensors_stay(streams: SimulatedStreams) -> None:
    module = Holder(a=torch.empty(3, device="meta"))
    loose = LooseTensors(streams, [module])
    assert module.a.device.type == "meta"
    assert loose_bytes([module]) == streams.allocated_bytes == 0
    loose.leave()


def test_a_module_that_is_gone_meanwhile(streams: SimulatedStreams) -> None:
    module = Holder(a=torch.randn(3))
    loose = LooseTensors(streams, [module])
    del module
    loose.leave()
    assert streams.allocated_bytes == 0


@pytest.mark.parametrize("room", [0, 512, 1024])
def test_out_of_memory_leaves_everything_on_the_host(room: int) -> None:
    streams = SimulatedStreams(capacity_bytes=room, bandwidth=1e12, latency=0.0)
    module = Holder(a=torch.ones(3), b=torch.ones(4), c=torch.ones(5))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        LooseTensors(streams, [module])
    assert streams.allocated_bytes == 0
    assert all(torch.equal(buffer, torch.ones(len(buffer))) for buffer in module.buffers())
    streams.close()
