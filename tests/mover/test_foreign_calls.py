"""Others call the module protocol on a managed network - `state_dict`, `load_state_dict`, `.half()`, `.to()` - between passes,
from another thread, from inside a forward: what they read is true, what they write counts, and passes stay the twin's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.mover.chains import Leaf, X, attached, call, on_thread, pair, recorded, same, simulated
from tests.mover.zoo import EVERYTHING, Zoo, every_budget, every_device, rig


class Follows(Zoo):
    """Computes in whatever dtype its parts have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x.to(self.enter.weight.dtype)).reshape(-1, 4, 8)
        for block in self.blocks:
            x = block(x.to(block.norm.weight.dtype))
        return self.out(x.to(self.out.weight.dtype)).sum(1).float()


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return Zoo().state_dict()


def load(net: nn.Module) -> None:
    net.load_state_dict(other_weights())


def load_partly(net: nn.Module) -> None:
    net.load_state_dict({name: value for name, value in other_weights().items() if name.startswith("blocks.1")}, strict=False)


def load_assigning(net: nn.Module) -> None:
    net.load_state_dict({name: nn.Parameter(value) for name, value in other_weights().items()}, assign=True)


def copied(net: nn.Module) -> None:
    kept = copy.deepcopy(net.state_dict())
    for value in kept.values():
        value.mul_(0.5)
    net.load_state_dict(kept)


def changed_and_put_back(net: nn.Module) -> None:
    kept = copy.deepcopy(net.state_dict())
    load(net)
    net.load_state_dict(kept)


def bfloat(net: nn.Module) -> None:
    net.bfloat16()


def double(net: nn.Module) -> None:
    net.double()


def there_and_back(net: nn.Module) -> None:
    net.half().float()


def to_the_host(net: nn.Module) -> None:
    net.to("cpu")
    net.cpu()


def frozen(net: nn.Module) -> None:
    net.requires_grad_(False)
    net.train().eval()


CALLS = [load, load_partly, load_assigning, copied, changed_and_put_back, bfloat, double, there_and_back, to_the_host, frozen]
ELSEWHERE: dict[str, Callable] = {"here": lambda work: work(), "on a thread": on_thread}


@every_device
@every_budget
@pytest.mark.parametrize("where", list(ELSEWHERE))
@pytest.mark.parametrize("drained", [True, False])
@pytest.mark.parametrize("act", CALLS, ids=lambda act: act.__name__)
def test_between_two_passes(act: Callable, drained: bool, where: str, device: str, budget: int) -> None:
    with rig(device, budget, Follows) as made:
        if drained:
            made.mover.drain()
        ELSEWHERE[where](lambda: made.both(act))
        made.same_weights()
        made.passes(2)
        counts = made.counted(2)
        assert (counts["adopted"], counts["refetches"], counts["write_backs"]) == (0, 0, 0)


@every_budget
@pytest.mark.parametrize("where", ["enter", "blocks.1.attention", "out"])
@pytest.mark.parametrize("act", [load, load_partly, load_assigning, to_the_host, there_and_back], ids=lambda act: act.__name__)
def test_from_inside_a_forward(act: Callable, where: str, budget: int) -> None:
    # Stock lets them: what has run has run, what comes has the new weights. Not under the recorder, which objects to the foreign
    # host writes themselves: copies that read the same masters are under way then. Those are stale, and made again.
    with rig("jittery", budget, Follows) as made:
        handles = []
        for net in (made.net, made.twin):

            def hook(module: nn.Module, args: tuple, net: nn.Module = net) -> None:
                with made.unjudged():
                    act(net)

            handles.append(net.get_submodule(where).register_forward_pre_hook(hook))
        made.passes(1)
        for handle in handles:
            handle.remove()
        made.same_weights()
        made.passes(2)


@every_budget
@pytest.mark.parametrize("where", ["enter", "blocks.1.attention", "out"])
def test_read_from_inside_a_forward(where: str, budget: int) -> None:
    # Not under the recorder: a deepcopy of a view of the ring copies all of the ring, wherever copies have got there.
    with rig("jittery", budget, Follows) as made:
        kept: list[dict] = []

        def hook(*_: object) -> None:
            with made.unjudged():
                kept.append(copy.deepcopy(made.net.state_dict()))

        handle = made.net.get_submodule(where).register_forward_pre_hook(hook)
        made.passes(2)
        handle.remove()
        for state in kept:
            for name, value in made.twin.state_dict().items():
                assert torch.equal(state[name], value), name


@every_budget
def test_a_model_emptied_between_passes_is_given_up(budget: int) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, budget)
    net.to("meta")
    mover.drain()
    assert mover.forget_dead() == ["net"]
    assert streams.allocated_bytes == 0
    assert all(parameter.device.type == "meta" for parameter in net.parameters())
    assert mover.status()["pinned_bytes"] == 0
    mover.detach()


def test_a_change_to_what_is_prefetched_is_fetched_again() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    before = mover.status()
    for chain in (net, twin):
        for leaf in chain.leaves:
            with torch.no_grad():
                leaf.weight.mul_(0.5)
    same(net, twin, streams)
    after = mover.status()
    # Those that were on their way, and those whose copies were enqueued after the change but before it was looked for.
    assert after["refetches"] - before["refetches"] == 6
    assert (after["write_backs"], after["adopted"]) == (before["write_backs"], before["adopted"])
    same(net, twin, streams)
    assert mover.status()["refetches"] == after["refetches"]
    mover.detach()


@pytest.mark.parametrize("target", [2, 3, 5])
def test_a_leaf_changed_by_an_earlier_one_while_its_copy_is_on_its_way(target: int) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    before = mover.status()["refetches"]

    def change(chain: nn.Module) -> Callable[[Leaf], None]:
        return lambda _: chain.leaves[target].weight.mul_(0.5)

    net.leaves[1].inside, twin.leaves[1].inside = change(net), change(twin)
    with torch.no_grad():
        expected = twin(X)
    with mover._context.checker.suspended():
        got = call(net, streams)
    assert torch.equal(got, expected)
    assert mover.status()["refetches"] - before == 1
    for _ in range(2):
        same(net, twin, streams)
    mover.detach()


def test_residents_changed_while_they_are_on_their_way() -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, EVERYTHING)
    mover.drain()
    with torch.no_grad():
        mover.prepare("net")
        for chain in (net, twin):
            chain.leaves[2].weight.mul_(0.5)
            chain.leaves[4].weight = nn.Parameter(chain.leaves[4].weight * 2)
    before = mover.status()
    same(net, twin, streams)
    after = mover.status()
    assert (after["refetches"] - before["refetches"], after["adopted"] - before["adopted"]) == (2, 1)
    same(net, twin, streams)
    streams.check()
    mover.detach()
