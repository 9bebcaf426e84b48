"""All contenders give the same bits, cost device memory as they should, and give the model back."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram.bench.contenders import Async, Resident, Stock, largest_block_bytes, weight_bytes
from lib_async_lowvram.bench.devices import SD15_WEIGHT_BYTES, measure_link, small_unit_bytes
from lib_async_lowvram.bench.options import BenchError
from lib_async_lowvram.bench.unet import regions, sd15
from lib_async_lowvram.core.stats import Trace
from lib_async_lowvram.device.simulated import SimulatedStreams

CHANNELS = 16
TOTAL = weight_bytes(sd15(CHANNELS, seed=None))


@pytest.fixture()
def streams():
    streams = SimulatedStreams(capacity_bytes=2 * TOTAL, bandwidth=float("inf"), latency=0.0, poison=True)
    yield streams
    streams.close()


@pytest.fixture()
def model():
    return sd15(CHANNELS, seed=1)


@pytest.fixture()
def inputs():
    return [(torch.randn(1, 4, 8, 8), torch.tensor([100.0 * n]), torch.randn(1, 77, 768)) for n in range(3)]


def contender_of(name, model, streams):
    if name == "async":
        return Async(model, streams, TOTAL // 2, small_leaf_bytes=4096)
    return {"resident": Resident, "stock": Stock}[name](model, streams)


@pytest.mark.parametrize("name", ["resident", "stock", "async"])
def test_same_bits_and_the_model_back(name, model, streams, inputs):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = [model(*each) for each in inputs]
    with contender_of(name, model, streams) as contender:
        for _ in range(2):
            for each, output in zip(inputs, expected, strict=True):
                assert torch.equal(contender.run_pass(each), output)
    contender.close()  # a second time does nothing
    assert streams.allocated_bytes == 0
    for key, parameter in model.named_parameters():
        assert not streams.owns(parameter.data_ptr()), key
        assert torch.equal(parameter, before[key]), key
    with torch.no_grad():
        assert torch.equal(model(*inputs[0]), expected[0])


def test_resident_costs_all_the_memory(model, streams, inputs):
    with Resident(model, streams) as contender:
        contender.run_pass(inputs[0])
        assert all(streams.owns(parameter.data_ptr()) for parameter in model.parameters())
        assert TOTAL <= contender.measured().peak_weight_bytes <= TOTAL * 1.1


def test_resident_without_room(model, inputs):
    streams = SimulatedStreams(capacity_bytes=TOTAL // 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Resident(model, streams).setup()
    streams.close()


def test_stock_holds_one_block_and_moves_both_ways(model, streams, inputs):
    moved = {"onload": 0, "offload": 0}

    def on_copy(lane, start, end, nbytes):
        moved[lane] += nbytes

    with Stock(model, streams) as contender:
        contender.run_pass(inputs[0])
        contender.reset()
        streams.on_copy = on_copy
        contender.run_pass(inputs[1])
        streams.on_copy = None
        streamed = sum(map(weight_bytes, regions(model)))
        assert moved == {"onload": streamed, "offload": streamed}
        peak = contender.measured().peak_weight_bytes
        assert largest_block_bytes(model) <= peak < 1.5 * largest_block_bytes(model)
        held = [block for block in regions(model) if streams.owns(next(block.parameters()).data_ptr())]
        assert held == [model.output_blocks[-1]]
        assert streams.owns(model.out[0].weight.data_ptr())


def test_stock_carries_changes_back(model, streams, inputs):
    """As stock does: what was written on the device is there after the block came back."""
    with torch.no_grad():
        with Stock(model, streams) as contender:
            contender.run_pass(inputs[0])
            model.output_blocks[-1][0].conv_in.bias.add_(1.0)
            changed = contender.run_pass(inputs[0])
        assert torch.equal(model(*inputs[0]), changed)


def test_stock_traces_moves_in_order(model, streams, inputs):
    with Stock(model, streams) as contender:
        contender.run_pass(inputs[0])
        contender.trace = Trace()
        contender.run_pass(inputs[1])
        spans = contender.trace.spans
    lanes = [[span for span in spans if span.lane == lane] for lane in ("write-back", "copy", "compute", "stall")]
    assert [len(lane) for lane in lanes] == [26] * 4
    assert [span.name for span in lanes[1]] == [span.name for span in lanes[2]]
    for back, there, computed in zip(*lanes[:3], strict=True):
        assert back.end_seconds <= there.start_seconds <= there.end_seconds <= computed.start_seconds <= computed.end_seconds


def test_async_stays_in_its_budget_and_does_something(model, streams, inputs):
    with contender_of("async", model, streams) as contender:
        contender.run_pass(inputs[0])
        contender.run_pass(inputs[1])
        contender.reset()
        for each in inputs:
            contender.run_pass(each)
        measured = contender.measured()
        assert contender.stall_seconds() == streams.stall_seconds
    assert measured.peak_weight_bytes <= contender.budget_bytes
    details = measured.details
    assert details["state"] == "active" and details["passes"] == 3
    assert details["hits"] > 0 and details["misses"] == 0 and details["host_waits"] == 0
    assert details["streamed_bytes"] > 0


@pytest.mark.parametrize("name", ["resident", "async"])
def test_between_turns_the_device_is_free_for_others(name, model, streams, inputs):
    with torch.no_grad():
        expected = [model(*each) for each in inputs]
    with contender_of(name, model, streams) as contender:
        for _ in range(2):
            for each, output in zip(inputs, expected, strict=True):
                assert torch.equal(contender.run_pass(each), output)
            contender.finish()
            contender.rest()
            assert streams.allocated_bytes < TOTAL // 10  # what is left are the layers that stock leaves there
        if name == "async":
            contender.rebudget(TOTAL // 4)
            assert torch.equal(contender.run_pass(inputs[0]), expected[0])
            assert contender.effective_budget_bytes() == TOTAL // 4
            contender.rebudget(1)
            contender.run_pass(inputs[0])
            assert TOTAL // 100 < contender.effective_budget_bytes() < TOTAL // 4  # raised to the least that works


def test_the_link_is_measured_by_copies_from_pinned_memory():
    streams = SimulatedStreams(capacity_bytes=1 << 24, bandwidth=1e9, latency=0.0)
    assert 0 < measure_link(streams, 1 << 20) <= 1e9 * 1.001  # never faster than it was set
    assert streams.allocated_bytes == 0
    streams.pinning = "none"
    with pytest.raises(BenchError, match="refused to pin 1 MB"):
        measure_link(streams, 1 << 20)
    streams.close()


def test_small_units_shrink_with_the_model_but_never_grow():
    assert small_unit_bytes(SD15_WEIGHT_BYTES) == small_unit_bytes(3 * SD15_WEIGHT_BYTES) == 1 << 20
    assert small_unit_bytes(SD15_WEIGHT_BYTES // 16) in (65535, 65536) and small_unit_bytes(1) == 1
