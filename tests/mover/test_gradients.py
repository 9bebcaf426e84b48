"""Passes with gradients: autograd keeps views of weights beyond the pass, and what it computes from them is the twin's.

A pass may turn out to be one with gradients when it is under way.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.mover.chains import Chain, Leaf, X, attached, call, judged, on_thread, pair, recorded, same, simulated
from tests.mover.zoo import EVERYTHING, MIXED, Rig, Zoo, every_budget, every_device, rig


class Shifted(Zoo):
    """Multiplies by a buffer's transpose, which is a view that autograd keeps."""

    def __init__(self) -> None:
        super().__init__(2)
        self.register_buffer("turn", torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ self.turn.t())


def loss_of(made: Rig, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with judged(made.streams), torch.enable_grad():
        return net(x).square().sum()


def same_gradients(made: Rig) -> None:
    theirs = dict(made.twin.named_parameters())
    for name, parameter in made.net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, theirs[name].grad), name
        assert parameter.grad.isfinite().all()


MEANWHILE: dict[str, Callable[[Rig], object]] = {
    "nothing": lambda made: None,
    "a drain": lambda made: made.mover.drain(),
    "a drain by another thread": lambda made: on_thread(made.mover.drain),
    "a pass without gradients": lambda made: made.passes(),
    "passes and a drain": lambda made: (made.passes(2), made.mover.drain()),
    "another pass with gradients": lambda made: [loss_of(made, net, X * 2) for net in (made.net, made.twin)],
    "prepare": lambda made: torch.no_grad()(made.mover.prepare)("net"),
    "detach": lambda made: made.mover.detach(),
}


@every_device
@every_budget
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("meanwhile", list(MEANWHILE))
def test_gradients_are_the_twins(device: str, budget: int, whole: bool, meanwhile: str) -> None:
    with rig(device, budget, Shifted, whole=whole) as made:
        inputs = [X.clone().requires_grad_() for _ in range(2)]
        losses = [loss_of(made, net, x) for net, x in zip((made.net, made.twin), inputs, strict=True)]
        assert torch.equal(*losses)
        before = made.mover.status()
        if meanwhile == "detach":
            made.worked(budget)
        MEANWHILE[meanwhile](made)
        for loss in losses:
            loss.backward()
        same_gradients(made)
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        if meanwhile == "detach":
            made.mover.attach({"net": made.net})
            made.passes(2)
        made.passes()
        assert made.mover.status()["networks"]["net"]["learning_passes"] == (1 if meanwhile != "detach" else 1)
        assert before["learning_passes"] == 1


@every_device
@every_budget
def test_training_between_other_passes(device: str, budget: int) -> None:
    with rig(device, budget) as made:
        optimizers = [torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9) for net in (made.net, made.twin)]
        for step in range(4):
            for net, optimizer in zip((made.net, made.twin), optimizers, strict=True):
                optimizer.zero_grad()
                for part in range(2):
                    loss_of(made, net, X * (step + part)).backward()
                optimizer.step()
            same_gradients(made)
            made.same_weights()
            if step % 2:
                made.passes(2)
        made.passes()
        status = made.mover.status()
        assert status["networks"]["net"]["adopted"] == 0  # written in place by the optimiser: seen by their versions
        assert status["peak_weight_bytes"] <= max(status["budget_bytes"], 1)


@every_device
@every_budget
def test_guidance_by_the_inputs_gradient_through_frozen_weights(device: str, budget: int) -> None:
    with rig(device, budget) as made:
        made.both(lambda net: net.requires_grad_(False))
        for _ in range(3):
            gradients = []
            for net in (made.net, made.twin):
                x = X.clone().requires_grad_()
                gradients.append(torch.autograd.grad(loss_of(made, net, x), x)[0])
            assert torch.equal(*gradients)
            made.passes()


@every_device
@every_budget
@pytest.mark.parametrize("reentrant", [True, False])
def test_leaves_that_run_again_during_backward(device: str, budget: int, reentrant: bool) -> None:
    class Checkpointed(Zoo):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x).reshape(-1, 4, 8)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if torch.is_grad_enabled() else block(x)
            return self.out(x).sum(1)

    with rig(device, budget, Checkpointed) as made:
        for _ in range(2):
            for net in (made.net, made.twin):
                net.zero_grad()
                loss = loss_of(made, net, X.clone().requires_grad_())
                with judged(made.streams), torch.enable_grad():
                    loss.backward()
            same_gradients(made)
            made.passes(2)


@every_device
@every_budget
@pytest.mark.parametrize("on_from", ["enter", "blocks.1", "blocks.1.attention", "blocks.2.wide"])
def test_gradients_turned_on_in_the_middle_of_a_pass(device: str, budget: int, on_from: str) -> None:
    with rig(device, budget) as made:
        losses = []
        for net in (made.net, made.twin):
            handle = net.get_submodule(on_from).register_forward_pre_hook(lambda *_: torch.set_grad_enabled(True) and None)
            with judged(made.streams):
                losses.append(net(X).square().sum())
                torch.set_grad_enabled(False)
            handle.remove()
        torch.set_grad_enabled(True)
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for mine, theirs in zip(made.net.parameters(), made.twin.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
        made.passes(2)


class Briefly(Chain):
    """Turns gradients on before one leaf, which turns them off again before it is done."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, leaf in enumerate(self.leaves):
            torch.set_grad_enabled(number == 2)
            x = leaf(x)
        return x


@every_budget
def test_gradients_on_for_one_leaf_and_off_before_it_ends(budget: int) -> None:
    streams = simulated()
    net, twin = pair(Briefly)
    mover = attached(net, streams, budget)
    taken: list[torch.Tensor] = []
    for chain in (net, twin):
        leaf = chain.leaves[2]

        def forward(x: torch.Tensor, leaf: nn.Module = leaf) -> torch.Tensor:
            taken.append((leaf.weight.t() * leaf.weight.t()).sum())  # its gradient reads the weight again
            torch.set_grad_enabled(False)
            return x + taken[-1]

        leaf.forward = forward
    with torch.no_grad():
        same(net, twin, streams)
        del taken[2:]  # the graphs of this pass are looked at when the next one is over
        same(net, twin, streams)
    mover.drain()
    for loss in taken[:2]:
        loss.backward()
    assert net.leaves[2].weight.grad.isfinite().all()
    assert torch.equal(net.leaves[2].weight.grad, twin.leaves[2].weight.grad)
    mover.detach()


# -- what is left standing -----------------------------------------------------------------------------------------------
def test_the_last_region_stands_until_the_next_pass_or_until_the_network_is_left() -> None:
    # `backward` may read the Parameters themselves, and an optimiser their gradients, on the device.
    streams = simulated()
    net, twin = pair()
    other, _ = pair()
    mover = attached(net, streams, EVERYTHING)
    mover.attach({"other": other})

    def on_device() -> list[bool]:
        return [streams.owns(parameter.data_ptr()) for parameter in net.parameters()]

    net(X)
    assert on_device() == [True] * 6
    call(other, streams)
    assert on_device() == [False] * 6
    net(X)
    mover.drain()
    assert on_device() == [False] * 6
    assert streams.allocated_bytes == 0
    net(X)
    same(net, twin, streams)
    assert mover.status()["peak_weight_bytes"] <= mover.status()["networks"]["net"]["budget_bytes"]
    mover.detach()


@pytest.mark.parametrize("budget", [1, MIXED])
def test_a_pass_with_gradients_that_fails_leaves_nothing_standing(budget: int) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, budget)
    mover.drain()

    def fail(_: Leaf) -> None:
        raise ValueError

    net.leaves[3].inside = fail
    with pytest.raises(ValueError):
        net(X)
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    mover.detach()


def test_weights_changed_while_they_stand_are_written_back() -> None:
    streams = recorded()
    net, twin = pair(Chain)
    mover = attached(net, streams)
    with judged(streams), torch.enable_grad():
        net(X)
    with torch.no_grad():
        for chain in (net, twin):
            chain.leaves[2].weight.mul_(0.5)
            chain.leaves[3].bias = nn.Parameter(torch.ones(8))
    before = mover.status()
    mover.drain()
    status = mover.status()
    assert (status["write_backs"] - before["write_backs"], status["adopted"] - before["adopted"]) == (1, 1)
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for _ in range(2):
        same(net, twin, streams)
    streams.check()
    mover.detach()
