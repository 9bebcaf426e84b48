"""Packed weights: what is packed and how, who is packed with whom, and that nothing is kept alive."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from lib_async_lowvram.core.states import IllegalTransition, UnitState
from lib_async_lowvram.device.dense import as_bytes, group_by_sharing, packable
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import ALIGNMENT, align
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


# -- packing -----------------------------------------------------------------------------------------------------------
KINDS = {
    "float32": lambda: torch.randn(3, 5),
    "float16": lambda: torch.randn(7).half(),
    "bfloat16": lambda: torch.randn(2, 2, 2).bfloat16(),
    "float64": lambda: torch.randn(9).double(),
    "complex": lambda: torch.randn(4, dtype=torch.complex64),
    "int8": lambda: torch.arange(11, dtype=torch.int8),
    "bool": lambda: torch.tensor([True, False, True]),
    "scalar": lambda: torch.tensor(1.5),
    "transposed": lambda: torch.randn(4, 6).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one channel": lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "inside another": lambda: torch.randn(10, 10)[2:5],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_keeps_everything_but_the_place(host: HostMemory, streams: SimulatedStreams, kind: str) -> None:
    tensor = KINDS[kind]()
    module = Holder(first=torch.randn(3), this=tensor.clone(memory_format=torch.preserve_format) if kind != "inside another" else tensor)
    parameter, before = module.this, module.this.data.clone()
    stride, dtype, shape = parameter.stride(), parameter.dtype, parameter.shape
    unit = unit_of(host, module)
    memory = streams.allocate(unit.nbytes)
    memory.copy_(unit.master)
    unit.bind(memory)
    for publish in (lambda: None, unit.publish, unit.unpublish):
        publish()
        assert module.this is parameter
        assert (parameter.stride(), parameter.dtype, parameter.shape) == (stride, dtype, shape)
        assert parameter.data_ptr() % ALIGNMENT == 0
        assert torch.equal(parameter.data, before)
    assert unit.nbytes == ALIGNMENT + align(before.numel() * before.element_size())
    assert parameter.data_ptr() - unit.master.data_ptr() == ALIGNMENT
    assert parameter.untyped_storage().nbytes() == unit.nbytes == host.host_bytes
    streams.free(memory)


def test_published_means_on_the_device_and_unpublished_on_the_master(host: HostMemory, streams: SimulatedStreams) -> None:
    module = Holder(weight=torch.randn(200), bias=torch.randn(3))
    unit = unit_of(host, module)
    unit.bind(streams.allocate(unit.nbytes))
    unit.publish()
    assert streams.owns(module.weight.data_ptr())
    assert module.bias.data_ptr() - module.weight.data_ptr() == 2 * ALIGNMENT
    unit.unpublish()
    assert module.weight.untyped_storage().data_ptr() == unit.master.data_ptr()


def test_tied_parameters_are_packed_once(host: HostMemory) -> None:
    weight = nn.Parameter(torch.randn(20, 10))
    one, other = Holder(a=torch.randn(1)), Holder(b=torch.randn(1))
    one.weight = weight
    other.weight = weight
    other.turned = nn.Parameter(weight.data.t())
    other.bits = nn.Parameter(weight.data.view(torch.int32), requires_grad=False)
    unit = unit_of(host, one, other)
    assert unit.nbytes == align(4) + align(4) + align(800)
    assert one.weight is other.weight
    assert one.weight.data_ptr() == other.turned.data_ptr() == other.bits.data_ptr()
    assert torch.equal(other.turned.data.t(), one.weight.data)
    assert other.turned.stride() == (1, 10)


UNPACKABLE: dict[str, Callable[[], torch.Tensor]] = {
    "zero size": lambda: torch.empty(0, 3),
    "subclass": lambda: torch.randn(3).as_subclass(type("Sub", (torch.Tensor,), {})),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "expanded": lambda: torch.randn(1).expand(4),
    "overlapping": lambda: torch.randn(10).as_strided((4, 4), (1, 1)),
    "with gaps": lambda: torch.randn(10)[::2],
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", UNPACKABLE)
def test_what_cannot_travel_as_bytes_is_left_alone(host: HostMemory, kind: str) -> None:
    tensor = UNPACKABLE[kind]()
    assert not packable(tensor)
    module = Holder(weight=torch.randn(5))
    module._parameters["odd"] = tensor
    unit = unit_of(host, module)
    assert [entry.name for mine in unit.entries for entry in mine] == ["weight"]
    assert module._parameters["odd"] is tensor
    assert unit.nbytes == ALIGNMENT
    assert unit.host_change() is Change.NONE


def test_inference_tensors_are_left_alone(host: HostMemory) -> None:
    with torch.inference_mode():
        module = Holder(weight=torch.randn(5))
    assert not packable(module.weight)
    assert packable(module.weight, inference=True)
    assert group_by_sharing([module]) == ([], [])
    with torch.inference_mode():
        unit = unit_of(host, Holder(weight=torch.randn(5).clone()), module)
    assert unit.nbytes == 0


def test_packing_in_inference_mode_makes_ordinary_tensors(host: HostMemory) -> None:
    module = Holder(weight=torch.randn(5))
    with torch.inference_mode():
        unit = unit_of(host, module)
    assert not unit.master.is_inference()
    with torch.no_grad():
        module.weight.mul_(2)
    assert unit.host_change() is Change.VALUES


def test_as_bytes_sees_the_same_memory() -> None:
    tensor = torch.arange(6, dtype=torch.int16)[2:]
    assert as_bytes(tensor).data_ptr() == tensor.data_ptr()
    assert as_bytes(tensor).numel() == 8
    assert as_bytes(tensor).view(torch.int16).tolist() == [2, 3, 4, 5]


# -- groups ------------------------------------------------------------------------------------------------------------
def test_groups_keep_those_that_share_together() -> None:
    base = torch.randn(4, 4)
    lone, first, second, empty = Holder(w=torch.randn(2)), Holder(w=base), Holder(w=base.t()), Holder(w=None)
    assert group_by_sharing([first, lone, empty, second]) == ([[first, second], [lone]], [])


@pytest.mark.parametrize("parts", [(slice(0, 6), slice(4, 10)), (slice(0, 10), slice(2, 4)), (slice(0, 10), slice(0, 4))])
def test_a_partial_overlap_is_unmanaged(parts: tuple[slice, slice]) -> None:
    base = torch.randn(10)
    one, other, lone = Holder(w=base[parts[0]]), Holder(w=base[parts[1]]), Holder(w=torch.randn(3))
    groups, unmanaged = group_by_sharing([one, lone, other])
    assert groups == [[lone]]
    assert {id(module) for module in unmanaged} == {id(one), id(other)}


def test_neighbours_in_one_storage_do_not_overlap() -> None:
    base = torch.randn(10)
    one, other = Holder(w=base[:4]), Holder(w=base[4:])
    assert group_by_sharing([one, other]) == ([[one], [other]], [])


def test_an_overlap_hidden_behind_a_longer_span_is_found() -> None:
    base = torch.randn(10)
    modules = [Holder(w=base), Holder(w=base[1:2]), Holder(w=base[5:7]), Holder(w=torch.randn(1))]
    groups, unmanaged = group_by_sharing(modules)
    assert groups == [[modules[3]]]
    assert len(unmanaged) == 3


# -- life --------------------------------------------------------------------------------------------------------------
def test_an_illegal_transition_raises(host: HostMemory) -> None:
    unit = unit_of(host, Holder(weight=torch.randn(4)))
    with pytest.raises(IllegalTransition, match="host -> in use"):
        unit.to(UnitState.IN_USE)


def test_a_state_dict_can_be_copied_and_kept(host: HostMemory) -> None:
    module = Holder(weight=torch.randn(4, 4), gain=torch.randn(3))
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    unit = unit_of(host, module)
    kept, copied = module.state_dict(), copy.deepcopy(module.state_dict())
    del module, unit
    gc.collect()
    for name, value in expected.items():
        assert torch.equal(kept[name], value)
        assert torch.equal(copied[name], value)
    copied["weight"].zero_()
    assert torch.equal(kept["weight"], expected["weight"])


def test_a_dropped_module_is_collected_and_its_memory_given_back(host: HostMemory, streams: SimulatedStreams) -> None:
    module = Holder(weight=torch.randn(400, 4))
    unit = unit_of(host, module)
    assert host.pin(unit.master)
    assert host.pinned_bytes == 6656 == unit.nbytes
    gone, parameter = weakref.ref(module), weakref.ref(module.weight)
    del module
    gc.collect()
    assert gone() is None
    assert parameter() is None
    assert not unit.alive
    unit.publish()  # nobody is left; nothing happens
    unit.unpublish()
    unit.accept_versions()
    assert unit.host_change() is Change.NONE
    del unit
    gc.collect()
    assert host.pinned_bytes == host.host_bytes == 0
