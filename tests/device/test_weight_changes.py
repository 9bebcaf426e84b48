"""How a change to packed weights is seen, whoever makes it and wherever the parameters point (I5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.weights import Change, Unit


@pytest.fixture
def streams() -> Iterator[SimulatedStreams]:
    made = SimulatedStreams(capacity_bytes=1 << 22, bandwidth=1e12, latency=0.0)
    yield made
    made.close()


@pytest.fixture
def host(streams: SimulatedStreams) -> HostMemory:
    return HostMemory(streams)


class Holder(nn.Module):
    """Any tensors as parameters."""

    def __init__(self, **tensors: torch.Tensor | None) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))


def unit_of(host: HostMemory, *modules: nn.Module) -> Unit:
    return Unit(0, "unit", modules, host)


def in_place(module: Holder) -> None:
    with torch.no_grad():
        module.weight.add_(1)


def by_view(module: Holder) -> None:
    with torch.no_grad():
        module.weight[0].zero_()


def new_parameter_over_the_same_bytes(module: Holder) -> None:
    module.weight = nn.Parameter(module.weight.data, requires_grad=False)


def swap(module: Holder) -> None:
    del module.gain
    module.bias = nn.Parameter(torch.zeros(4))


CHANGES: list[tuple[str, Callable[[Holder], object], Change]] = [
    ("nothing", lambda module: None, Change.NONE),
    ("in place", in_place, Change.VALUES),
    ("through a view", by_view, Change.VALUES),
    ("data assigned", lambda module: setattr(module.weight, "data", torch.zeros(4, 4)), Change.LAYOUT),
    ("a new Parameter", lambda module: setattr(module, "weight", nn.Parameter(torch.zeros(4, 4))), Change.LAYOUT),
    ("a new Parameter over the same bytes", new_parameter_over_the_same_bytes, Change.LAYOUT),
    ("a bias added", lambda module: setattr(module, "bias", nn.Parameter(torch.zeros(4))), Change.LAYOUT),
    ("another parameter registered", lambda module: module.register_parameter("scale", nn.Parameter(torch.zeros(4))), Change.LAYOUT),
    ("none registered", lambda module: module.register_parameter("scale", None), Change.NONE),
    ("a bias removed", lambda module: setattr(module, "gain", None), Change.LAYOUT),
    ("a parameter deleted", lambda module: delattr(module, "gain"), Change.LAYOUT),
    ("one swapped for another", swap, Change.LAYOUT),
    ("another dtype, same bytes", lambda module: setattr(module.weight, "data", module.weight.data.view(torch.int32)), Change.LAYOUT),
    ("transposed", lambda module: setattr(module.weight, "data", module.weight.data.t()), Change.LAYOUT),
    ("another shape", lambda module: setattr(module.weight, "data", module.weight.data.view(2, 8)), Change.LAYOUT),
]


@pytest.fixture(params=[False, True], ids=["on the host", "on the device"])
def placed(request: pytest.FixtureRequest, host: HostMemory, streams: SimulatedStreams) -> tuple[Holder, Unit, bool]:
    """A module, its unit, and whether that is published."""
    module = Holder(weight=torch.randn(4, 4), gain=torch.randn(4), bias=None)
    unit = unit_of(host, module)
    unit.bind(streams.allocate(unit.nbytes))
    if request.param:
        unit.publish()
    return module, unit, request.param


each_change = pytest.mark.parametrize(("name", "act", "expected"), CHANGES, ids=[name for name, _, _ in CHANGES])


@each_change
def test_how_a_change_is_seen(placed: tuple[Holder, Unit, bool], name: str, act: Callable[[Holder], object], expected: Change) -> None:
    module, unit, on_device = placed
    look = unit.device_change if on_device else unit.host_change
    assert look() is Change.NONE
    act(module)
    assert look() is expected
    if expected is Change.VALUES:
        unit.accept_versions()
    elif expected is Change.LAYOUT:
        unit.pack()
        look = unit.host_change
    assert look() is Change.NONE


@each_change
def test_what_changed_is_not_moved_in_one_go(
    placed: tuple[Holder, Unit, bool], name: str, act: Callable[[Holder], object], expected: Change
) -> None:
    module, unit, on_device = placed
    act(module)
    before = [(parameter, parameter.data_ptr(), parameter._version) for parameter in module.parameters()]
    there, back = (unit.unpublish_unchanged, unit.publish_unchanged) if on_device else (unit.publish_unchanged, unit.unpublish_unchanged)
    assert there() is (expected is Change.NONE)
    if expected is Change.NONE:
        assert module.weight.data_ptr() == (unit.master if on_device else unit.memory).data_ptr()
        assert back()
    else:
        assert (unit.device_change if on_device else unit.host_change)() is expected
        assert [(parameter, parameter.data_ptr(), parameter._version) for parameter in module.parameters()] == before


@pytest.mark.parametrize("flag", ["dirty", "suspect"])
def test_what_somebody_told_of_is_not_moved_in_one_go(host: HostMemory, streams: SimulatedStreams, flag: str) -> None:
    unit = unit_of(host, module := Holder(weight=torch.randn(4)))
    unit.bind(streams.allocate(unit.nbytes))
    setattr(unit, flag, True)
    assert unit.publish_unchanged() is (flag == "suspect")  # that is about what was on the device
    unit.publish()
    assert not unit.unpublish_unchanged()
    assert module.weight.data_ptr() == unit.memory.data_ptr()


def test_a_change_told_of_counts_until_accepted(host: HostMemory, streams: SimulatedStreams) -> None:
    unit = unit_of(host, module := Holder(weight=torch.randn(4)))
    unit.bind(streams.allocate(unit.nbytes))
    unit.publish()
    module.weight.data.zero_()
    assert unit.device_change() is Change.NONE  # nobody can see that one
    unit.dirty = True
    assert unit.device_change() is Change.VALUES
    unit.accept_versions()
    assert unit.device_change() is Change.NONE


def test_moving_is_no_change(host: HostMemory, streams: SimulatedStreams) -> None:
    unit = unit_of(host, module := Holder(weight=torch.randn(4)))
    in_place(module)
    unit.accept_versions()
    for _ in range(2):
        memory = streams.allocate(unit.nbytes)
        unit.bind(memory)
        unit.publish()
        assert unit.device_change() is Change.NONE
        unit.unpublish()
        assert unit.host_change() is Change.NONE
        unit.unbind()
        streams.free(memory)
