"""Loose tensors and packing under a mover, as a review found them wrong."""

from __future__ import annotations

import torch
from torch import nn

from lib_async_lowvram.device.loose import LooseTensors
from tests.mover.chains import attached, pair, recorded, same, simulated
from tests.mover.test_write_back import give_bias


def test_no_false_placement_fault_for_a_loose_tensor_that_is_no_block():
    """A loose tensor that has no memory of its own on the device (expanded, sparse, a subclass) is not guarded: on the
    simulated device it is the host tensor itself."""
    streams = simulated()
    net, twin = pair()
    for each in (net, twin):
        torch.manual_seed(1)
        each.leaves[2].weight = nn.Parameter(torch.randn(256, 1).expand(256, 8), requires_grad=False)
    mover = attached(net, streams)
    same(net, twin, streams)
    faults = mover.status()["placement_faults"]
    mover.detach()
    assert faults == 0


def test_data_assigned_to_the_stand_in_of_an_inference_born_buffer_is_kept():
    """The object that stands in is not the one compared with, or a change would be compared with itself."""
    streams = simulated()
    module = nn.Module()
    with torch.inference_mode():
        module.register_buffer("a", torch.arange(4.0))
    loose = LooseTensors(streams, [module])
    with torch.inference_mode():
        module.a.data = module.a.data + 1
    loose.leave()
    assert module.a.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_what_a_region_pass_packs_anew_is_freed_behind_the_packing():
    """A bias added inside a forward of the learning pass: packing reads the device memory, so that is freed behind it."""
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, passes=0)
    net.leaves[3].inside = twin.leaves[3].inside = give_bias
    same(net, twin, streams)
    mover.detach()
    streams.check()


def test_a_parameter_that_cannot_be_packed_is_on_the_device_in_the_very_next_pass():
    """Born in inference mode, and assigned between two passes: the acquire that adopts the rest moves it, too."""
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    with torch.inference_mode():
        weight = torch.randn(256, 8)
        net.leaves[2].weight = nn.Parameter(weight.clone())
    twin.leaves[2].weight = nn.Parameter(weight.clone(), requires_grad=False)
    seen = []
    net.leaves[2].register_forward_pre_hook(lambda leaf, _: seen.append(streams.owns(leaf.weight.data_ptr())))
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["placement_faults"] == 0
    mover.detach()
    assert seen == [True] * 3
    assert not streams.owns(net.leaves[2].weight.data_ptr())
