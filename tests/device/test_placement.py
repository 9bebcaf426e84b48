"""The placement checker, its address sets, and the schema reading under it."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from lib_async_lowvram.device.address_ranges import AddressRanges, HostRanges
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.op_access import byte_range, without_dispatch_modes
from lib_async_lowvram.device.placement import PlacementChecker, PlacementFault
from lib_async_lowvram.device.simulated import SimulatedStreams


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def no_gradients(request):
    with request.param():
        yield


@pytest.fixture
def master():
    return torch.arange(16, dtype=torch.float32).reshape(4, 4)


@pytest.fixture
def checker(master):
    ranges = HostRanges()
    ranges.add(master)
    checker = PlacementChecker(ranges.overlaps)
    checker.ranges = ranges
    return checker


X = torch.ones(4, 4)

FAULTS = {
    "argument": lambda m: X + m,
    "nested list": lambda m: torch.cat([X, m]),
    "keyword": lambda m: torch.clamp(X, min=m),
    "out": lambda m: torch.add(X, X, out=m),
    "in place": lambda m: m.add_(1),
    "foreach": lambda m: torch._foreach_add([X, m], 1.0),
    "through a view": lambda m: X @ m.t()[1:].t(),
    "other dtype": lambda m: m.view(torch.int32) + 1,
    "linear": lambda m: torch.nn.functional.linear(X, m),
    "copy into": lambda m: m.copy_(X),
    "copy from": lambda m: torch.empty(4, 4).copy_(m),
    "to another dtype": lambda m: m.to(torch.float16),
    "reshape that copies": lambda m: m.t().reshape(-1),
    "contiguous that copies": lambda m: m.t().contiguous(),
    "clone": lambda m: m.clone(),
    "item": lambda m: m[0, 0].item(),
    "setitem": lambda m: m.__setitem__((0, 0), 5.0),
    "equal": lambda m: torch.equal(X, m),
}

HARMLESS = {
    "views": lambda m: m.t().view(-1, 2, 2) if m.t().is_contiguous() else m.view(2, 8).transpose(0, 1).unsqueeze(0).detach(),
    "reshape that views": lambda m: m.reshape(-1),
    "to the same": lambda m: m.to(torch.float32),
    "contiguous already": lambda m: m.contiguous(),
    "shape only": lambda m: torch.empty_like(m) + torch.zeros_like(m) + m.new_ones(4, 4),
    "dtype view": lambda m: m.view(torch.int32),
    "chunks": lambda m: [part.shape for part in m.chunk(2)],
    "others": lambda m: X @ X,
    "data": lambda m: m.data.data_ptr(),
    "empty slice": lambda m: X[:0] + m[:0],
}


def skip_where_torch_itself_refuses(what):
    if "dtype" in what and "to another" not in what and torch.is_inference_mode_enabled() and torch.__version__.startswith("2.1."):
        pytest.skip("torch 2.1 refuses dtype views of ordinary tensors in inference mode under any dispatch mode")


@pytest.mark.parametrize("what", FAULTS)
def test_touching_a_master_is_a_fault(checker, master, no_gradients, what):
    skip_where_torch_itself_refuses(what)
    with pytest.raises(PlacementFault, match="aten"), checker:
        FAULTS[what](master)
    assert checker.faults == 1 and "host weights" in checker.last_fault


@pytest.mark.parametrize("what", HARMLESS)
def test_views_and_shapes_of_a_master_are_not(checker, master, no_gradients, what):
    skip_where_torch_itself_refuses(what)
    with checker:
        HARMLESS[what](master)
    assert checker.faults == 0 and checker.last_fault is None


def test_a_write_is_stopped_before_it_happens(checker, master):
    with pytest.raises(PlacementFault, match="add_.* writes"), checker:
        master.add_(1)
    assert master[0, 0] == 0


def test_the_other_half_of_a_storage_counts_by_its_storage(checker):
    whole = torch.zeros(100)
    checker.ranges.add(whole[:10])
    with pytest.raises(PlacementFault), checker:
        whole[50:] + 1
    checker.ranges.remove(whole)
    with checker:
        whole[50:] + 1


def test_tensors_without_memory_are_skipped(checker):
    sparse, meta = torch.eye(4).to_sparse(), torch.empty(4, 4, device="meta")
    assert byte_range(sparse) is byte_range(meta) is byte_range(torch.empty(0)) is None
    with checker:
        torch.sparse.mm(sparse, X)
        meta + meta
    assert checker.faults == 0


def test_byte_range_of_strided_views():
    base = torch.zeros(10, 10, dtype=torch.float16)
    start = base.data_ptr()
    assert byte_range(base) == (start, start + 200)
    assert byte_range(base[1:3, 2:4]) == (start + 24, start + 24 + 2 * (10 + 1) + 2)
    assert byte_range(base[0, 0].expand(5, 5)) == (start, start + 2)
    assert byte_range(base.t()) == (start, start + 200)


def test_counting_mode_only_counts(master):
    ranges = HostRanges()
    ranges.add(master)
    checker = PlacementChecker(ranges.overlaps, counting=True)
    with checker:
        result = master + master
        X + X
    assert checker.faults == 2 and "aten.add" in checker.last_fault and torch.equal(result, master * 2)


def test_enter_and_exit_are_paired_flat_and_tolerant(checker):
    assert not checker.exit()
    assert checker.enter() and not checker.enter()
    assert checker.exit() and not checker.exit()
    assert _get_current_dispatch_mode() is None


def test_what_a_base_exception_left_behind_is_taken_over(checker, master):
    class Interrupted(BaseException):
        pass

    def region():
        checker.enter()
        raise Interrupted

    with pytest.raises(Interrupted):
        region()
    assert not checker.enter()  # still there
    with pytest.raises(PlacementFault):
        master + 1
    assert checker.exit() and _get_current_dispatch_mode() is None


def test_exit_does_not_take_another_mode_away(checker):
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    checker.enter()
    with Other() as other:
        assert not checker.exit()
        assert _get_current_dispatch_mode() is other
    assert checker.exit()


def test_each_thread_enters_for_itself(checker, master):
    seen = []

    def other():
        seen.append(checker.exit())
        master + 1
        seen.append(checker.enter())
        seen.append(checker.exit())

    with checker:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [False, True, True] and checker.faults == 0


def test_suspended_lets_the_mover_work(checker, master):
    with checker:
        with checker.suspended():
            with checker.suspended():
                master + 1
            master + 1
        with pytest.raises(PlacementFault):
            master + 1


def test_without_dispatch_modes(checker, master):
    with checker, without_dispatch_modes():
        master + 1
    with without_dispatch_modes():
        master + 1
    assert checker.faults == 0


# -- address sets ------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60), st.integers(0, 12)), max_size=40), st.integers(0, 70), st.integers(1, 10))
def test_address_ranges_against_a_set_of_bytes(steps, start, length):
    ranges, model = AddressRanges(), {}
    for add, low, size in steps:
        overlap = any(low < end and begin < low + size for begin, end in model.items())
        if add and size and not overlap:
            ranges.add(low, low + size)
            model[low] = low + size
        elif add:
            with pytest.raises(ValueError):
                ranges.add(low, low + size)
        elif low in model:
            assert ranges.remove(low) == (low, model.pop(low))
        else:
            with pytest.raises(KeyError):
                ranges.remove(low)
    end = start + length
    assert list(ranges) == sorted(model.items()) and len(ranges) == len(model)
    assert ranges.overlaps(start, end) == any(start < high and low < end for low, high in model.items())
    assert ranges.contains(start, end) == any(low <= start and end <= high for low, high in model.items())
    assert ranges.find(start) == next(((low, high) for low, high in model.items() if low <= start < high), None)


def test_host_ranges_follow_the_storage_not_the_tensor():
    dropped = []
    ranges = HostRanges(on_drop=lambda start, end: dropped.append((start, end)))
    tensor = torch.zeros(1000)
    where = byte_range(tensor)
    ranges.add(tensor)
    ranges.add(tensor[5:])
    view = tensor[100:200]
    del tensor
    assert ranges.overlaps(*where) and len(ranges) == 1
    del view
    gc.collect()
    assert len(ranges) == 0 and not ranges.overlaps(*where)
    assert dropped == [where]


def test_host_ranges_of_two_storages_over_one_memory_last_as_long_as_either():
    memory = HostMemory(SimulatedStreams())
    block = memory.allocate(4096)
    numpy_side = torch.from_numpy(block.numpy())[:100].view(torch.float32)
    where = byte_range(numpy_side)
    ranges = HostRanges()
    ranges.add(block)
    ranges.add(numpy_side)
    assert len(ranges) == 1
    ranges.remove(block)
    assert ranges.overlaps(*where)
    ranges.remove(numpy_side)
    assert not ranges.overlaps(*where) and len(ranges) == 0


def test_adding_or_removing_nothing_is_nothing():
    ranges = HostRanges()
    ranges.add(torch.empty(0))
    ranges.remove(torch.empty(0))
    ranges.remove(torch.ones(3))
    assert len(ranges) == 0
