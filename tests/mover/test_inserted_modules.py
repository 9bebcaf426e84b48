"""Modules that come and go between passes, and leaves that are called where nobody expects it, as the WebUI's extensions do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib_async_lowvram import NetworkSpec, Region
from tests.lora_double import LoraDouble, Network
from tests.mover.chains import attached, judged, on_thread, pair, recorded, same, simulated
from tests.mover.zoo import Zoo, every_budget, every_device, rig


class Adapter(nn.Module):
    """Put in a leaf's place, around it."""

    def __init__(self, inner: nn.Module, seed: int) -> None:
        super().__init__()
        self.inner = inner
        torch.manual_seed(seed)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(x))


def adapt(net: Zoo) -> None:
    for number, block in enumerate(net.blocks):
        block.linear = Adapter(block.linear, number)


def restore(net: Zoo) -> None:
    for block in net.blocks:
        block.linear = block.linear.inner


@every_device
@every_budget
def test_an_adapter_around_a_leaf_added_and_removed(device: str, budget: int) -> None:
    with rig(device, budget) as made:
        units = made.mover.status()["networks"]["net"]["units"]
        made.both(adapt)
        assert made.counted(3)["learning_passes"] == 1
        assert made.mover.status()["networks"]["net"]["units"] == units + 6
        made.both(restore)
        assert made.counted(3)["learning_passes"] == 1
        assert made.mover.status()["networks"]["net"]["units"] == units
        assert made.counted(2)["adopted"] == 0


class Scaled(Zoo):
    """Its norm has places for weights, and none there."""

    def __init__(self) -> None:
        super().__init__(2)
        self.scale = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(super().forward(x))


@every_device
@every_budget
def test_weights_given_to_a_module_that_had_places_for_them(device: str, budget: int) -> None:
    with rig(device, budget, Scaled) as made:
        seen: list[bool] = []
        made.net.scale.register_forward_pre_hook(
            lambda module, _: seen.append(module.weight is None or made.streams.owns(module.weight.data_ptr()))
        )
        made.both(lambda net: setattr(net.scale, "weight", nn.Parameter(torch.linspace(0.5, 1.5, 8))))
        made.passes(3)
        made.both(lambda net: setattr(net.scale, "weight", None))
        made.passes(2)
        assert seen == [True] * 5


class Motion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("position", torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x) + self.position
        return x + self.attention(y, y, y, need_weights=False)[0]


class Sequential(Zoo):
    """Blocks that can take more modules."""

    def __init__(self) -> None:
        super().__init__(2)
        self.blocks = nn.ModuleList(nn.Sequential(block) for block in self.blocks)


@every_device
@every_budget
def test_a_whole_block_inserted_into_a_sequential(device: str, budget: int) -> None:
    # AnimateDiff puts its motion modules there before a job, and takes them out after it.
    with LoraDouble() as lora, rig(device, budget, Sequential) as made:
        for net in (made.net, made.twin):
            net.motion = None  # theirs is not registered anywhere else
        made.passes(2)
        for _ in range(2):
            made.both(lambda net: [block.append(Motion()) for block in net.blocks])
            lora.name_layers(made.net, made.twin)
            assert made.counted(3)["learning_passes"] == 1
            lora.want(Network("one"))
            made.passes(2)
            lora.want()
            made.passes()
            made.both(lambda net: [block.pop(1) for block in net.blocks])
            assert made.counted(3)["learning_passes"] == 1


class Text(nn.Module):
    """Its embedding is read by others too."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(16, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.token_embedding(x.long().clamp(0, 15).sum(-1, keepdim=True) % 16)).sum(1)


@every_budget
@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("open_ended", [True, False])
def test_the_token_embedding_called_on_its_own(budget: int, elsewhere: bool, open_ended: bool) -> None:
    # `create_embedding`: ids are sent to where the weight is, then the hooked module is called, in no pass, perhaps with gradients.
    # (With a compute stream of its own a thread must not call leaves that are resident outside of passes: they carry no hooks.)
    streams = simulated() if elsewhere else recorded()
    text, twin = pair(Text)
    trigger = text.token_embedding if open_ended else text
    spec = NetworkSpec([Region(text, trigger)], trigger, open_ended=open_ended)
    mover = attached(spec, streams, budget, run=text)

    def create(gradients: bool) -> None:
        with judged(streams), torch.set_grad_enabled(gradients):
            ids = torch.tensor([3, 1, 4]).to(text.token_embedding.weight.device)
            assert torch.equal(text.token_embedding(ids), twin.token_embedding(ids))

    for gradients in (False, True, False):
        for drained in (True, False):
            if drained:
                mover.drain()
            on_thread(lambda gradients=gradients: create(gradients)) if elsewhere else create(gradients)
            same(text, twin, streams)
            same(text, twin, streams)
    mover.drain()
    assert torch.equal(*(F.embedding(torch.tensor([2]), each.token_embedding.weight) for each in (text, twin)))
    assert mover.status()["placement_faults"] == 0
    assert mover.status()["passes"] > 0
    if not elsewhere:
        streams.check()
    mover.detach()


class Hooked(nn.Module):
    """Owns weights, and calls leaves that are hooked for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.norm(x) * self.gain) * self.gain


class NestedZoo(Zoo):
    def __init__(self) -> None:
        super().__init__(2)
        for block in self.blocks:
            block.linear = Hooked()


@every_device
@every_budget
def test_a_hooked_unit_inside_another_under_lora(device: str, budget: int) -> None:
    with LoraDouble() as lora, rig(device, budget, NestedZoo) as made:
        lora.name_layers(made.net, made.twin)
        for wanted in ([Network("one")], [Network("one", 0.5)], []):
            lora.want(*wanted)
            counts = made.counted()
            assert (counts["write_backs"], counts["adopted"]) == (2 + 2 * 8, 0)
            assert made.counted(2)["write_backs"] == 0
        for net in (made.net, made.twin):
            for block in net.blocks:  # and the outer one's own weight, while it runs, when the inner one has

                def change(module: nn.Module, args: tuple, output: torch.Tensor, outer: Hooked = block.linear) -> None:
                    outer.gain.mul_(0.9)

                block.linear.inner.register_forward_hook(change)
        assert made.counted()["write_backs"] == 2
        made.passes(2)


@every_budget
def test_gradients_that_come_on_while_another_unit_is_in_use(budget: int) -> None:
    # One leaf has changed its weight and calls another one with gradients on: streaming ends with the first one in its place.
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, budget)
    losses: list[torch.Tensor] = []
    for chain in (net, twin):

        def call_another(leaf: nn.Module, args: tuple, other: nn.Module = chain.leaves[2]) -> None:
            leaf.weight.mul_(0.5)
            with torch.enable_grad():
                losses.append(other(args[0]).sum() + (other.weight.t() * other.weight.t()).sum())

        chain.leaves[0].register_forward_pre_hook(call_another)
    same(net, twin, streams)
    same(net, twin, streams)
    resident = streams.owns(net.leaves[2].weight.data_ptr())
    if not resident:
        mover.drain()
    for loss in losses:  # nobody sees that arrived residents fire; what autograd keeps of them is theirs until they leave
        loss.backward()
    mover.drain()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(net.leaves[2].weight.grad, twin.leaves[2].weight.grad)
    assert mover.status()["placement_faults"] == 0
    mover.detach()
    assert streams.allocated_bytes == 0
