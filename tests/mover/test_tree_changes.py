"""The tree is not what it was, or not a tree: modules and weights come late, leaves call strangers, weights are replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, attached, call, pair, recorded, same, simulated

BUDGETS = [1, 4 * LEAF_BYTES, 1 << 20]


class Outer(nn.Module):
    """Owns weights and calls, inside its forward, modules that are not its children (adapters and hijacks hold such references)."""

    def __init__(self, *others: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(256, 8))
        self.others = others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for other in self.others:
            x = other(x)
        return x + torch.tanh(x @ self.weight.t()).sum(-1, keepdim=True)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Leaf(rows) for rows in (200, 256, 100, 256, 30, 256, 220))
        self.outers = nn.ModuleList([Outer(*self.inner[:3]), Outer(*self.inner[3:])])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for outer in self.outers:
            x = outer(x)
        return x


@pytest.mark.parametrize("budget", [1, 40_000, 1 << 20])
def test_a_leaf_that_calls_modules_that_are_not_its_children(budget: int) -> None:
    streams = recorded()
    net, twin = pair(Nested)
    mover = attached(net, streams, budget, passes=0)
    for _ in range(4):
        same(net, twin, streams)
    status = mover.status()
    assert status["placement_faults"] == status["misses"] == 0
    assert status["peak_weight_bytes"] <= status["budget_bytes"]  # both are there at once, in memory that was planned for
    streams.check()
    mover.detach()


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_leaf_that_begins_to_call_another_one_later(budget: int) -> None:
    # The learning pass saw them one after the other; now both are needed at once, perhaps in one place of the ring.
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    for chain in (net, twin):
        for one, other in ((0, 2), (1, 3), (5, 4)):
            chain.leaves[one].register_forward_pre_hook(lambda _, args, other=chain.leaves[other]: (other(args[0]),))
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["placement_faults"] == 0
    mover.drain()
    assert streams.allocated_bytes == 0
    streams.check()
    mover.detach()


class Late(nn.Module):
    """Has an activation that may be given a parameter or a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.act = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.chain(x))
        return x * getattr(self.act, "gain", 1.0) + getattr(self.act, "shift", 0.0)


@pytest.mark.parametrize("kind", ["gain", "shift"])
def test_a_parameter_or_buffer_given_to_a_module_that_had_none_is_moved(kind: str) -> None:
    streams = simulated()
    net, twin = pair(Late)
    mover = attached(net, streams)
    for each in (net, twin):
        value = torch.tensor([2.0])
        if kind == "gain":
            each.act.gain = nn.Parameter(value)
        else:
            each.act.register_buffer("shift", value)
    seen: list[bool] = []
    net.act.register_forward_hook(lambda act, *_: seen.append(streams.owns(getattr(act, kind).data_ptr())))
    for _ in range(3):
        same(net, twin, streams)
    assert seen == [True] * 3
    mover.detach()
    assert not streams.owns(getattr(net.act, kind).data_ptr())


@pytest.mark.parametrize("budget", BUDGETS)
def test_modules_inserted_and_removed_after_attach(budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    extra = Leaf()
    mine = Leaf()
    mine.load_state_dict(extra.state_dict())
    for chain, leaf in ((net, mine), (twin, extra)):
        chain.leaves.insert(2, leaf)
        chain.order = list(range(7))
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    assert status["networks"]["net"]["units"] == 7
    assert (status["learning_passes"], status["passes"]) == (2, 3)
    for chain in (net, twin):
        del chain.leaves[0]
        chain.order = list(range(6))
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    assert status["networks"]["net"]["units"] == 6
    assert status["placement_faults"] == 0
    streams.check()
    mover.detach()
    assert not mine._forward_pre_hooks


def same_bytes(leaf: Leaf) -> None:
    # The version it had: only the object tells it from the one before.
    version, data = leaf.weight._version, leaf.weight.data
    for _ in range(version):
        data.mul_(0.5)
    leaf.weight = nn.Parameter(data)
    assert leaf.weight._version == version


def grow(leaf: Leaf) -> None:
    leaf.weight = nn.Parameter(torch.cat([leaf.weight.data, leaf.weight.data]))


def shrink(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight.data[:100]


def assign(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight.data * 2


def write(leaf: Leaf) -> None:
    with torch.no_grad():
        leaf.weight.mul_(2)


def flip(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight.data.flip(0).t().contiguous().t()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("change", [same_bytes, grow, shrink, assign, write, flip])
def test_weights_replaced_between_passes(change: Callable[[Leaf], None], budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    with torch.no_grad():
        for chain in (net, twin):
            for leaf in chain.leaves:
                leaf.weight.mul_(1.0)  # versions other than 0
    same(net, twin, streams)
    for chain in (net, twin):
        for leaf in (chain.leaves[1], chain.leaves[5]):
            change(leaf)
    seen: list[bool] = []
    for leaf in net.leaves:
        leaf.register_forward_pre_hook(lambda leaf, _: seen.append(streams.owns(leaf.weight.data_ptr())))
    for _ in range(3):
        same(net, twin, streams)
    assert seen == [True] * 18
    assert mover.status()["placement_faults"] == 0
    mover.drain()
    assert streams.allocated_bytes == 0
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    streams.check()
    mover.detach()


class Caching(nn.Module):
    """Makes a buffer when first called, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.register_buffer("cache", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cache is None:
            self.cache = torch.arange(8.0) * 0.1
        return self.chain(x) + self.cache


@pytest.mark.parametrize("build", [Chain, Caching, Late])
@pytest.mark.parametrize("born", [True, False])
def test_inference_mode(build: Callable[[], nn.Module], born: bool) -> None:
    # Tensors born in inference mode have no version and cannot be re-pointed.
    streams = simulated()
    with torch.inference_mode(born):
        net, twin = pair(build)
    mover = attached(net, streams, passes=0)
    with torch.inference_mode():
        for _ in range(4):
            assert torch.equal(net(torch.ones(1, 8)), twin(torch.ones(1, 8)))
    mover.detach()
    with torch.inference_mode():
        assert torch.equal(net(torch.ones(1, 8)), twin(torch.ones(1, 8)))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("change", [same_bytes, grow, assign, write])
def test_weights_changed_after_their_onload_was_enqueued(change: Callable[[Leaf], None], budget: int) -> None:
    # `prepare` has started the first onloads, residents' too; what they carry is not what the next pass must see.
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, budget)
    mover.drain()
    with torch.no_grad():
        mover.prepare("net")
    for chain in (net, twin):
        for leaf in chain.leaves:
            change(leaf)
    for _ in range(2):
        same(net, twin, streams)
    mover.detach()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_load_state_dict_between_passes() -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, 4 * LEAF_BYTES)
    torch.manual_seed(1)
    weights = Chain().state_dict()
    for chain in (net, twin):
        chain.load_state_dict(weights)
    for _ in range(2):
        same(net, twin, streams)
    call(net, streams)
    assert mover.status()["adopted"] == 0
    streams.check()
    mover.detach()


@pytest.mark.parametrize("prepared", [False, True])
def test_weights_that_have_gone_to_the_meta_device(prepared: bool) -> None:
    """As accelerate's offloading leaves them: its own hooks bring them for each call. The network is nobody's from the next pass on, and
    that pass opens nothing that is never closed."""
    streams = simulated(pinning="none")
    net, _ = pair()
    mover = attached(net, streams, 2 * LEAF_BYTES)
    for leaf in net.leaves:
        leaf._parameters["weight"] = nn.Parameter(torch.empty(256, 8, device="meta"))
        leaf.forward = lambda x: x + 1
    if prepared:
        with torch.no_grad():
            mover.prepare("net")
    assert torch.equal(call(net, streams), X + 6)
    assert not mover.is_attached and mover.current_network is None and not mover.demoted
    assert not [hook for module in net.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]
    assert streams.allocated_bytes == 0 and mover.status()["staging_bytes"] == 0
    mover.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "async-lowvram-staging"]
