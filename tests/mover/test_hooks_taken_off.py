"""Hooks of ours that disappear in the very call that is about to reach them.

torch takes a list of a module's hooks when the call starts, and looks up only then, hook by hook, whether one wants keyword
arguments. When the first one takes the second one off, the second is called all the same, and without them. That happens when
modules were inserted in the middle of a pass (hypernetworks put theirs into attention as it runs) and the next to be called is a
leaf on its own: its observer sees the change, and everything is looked at anew.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lib_async_lowvram import unit_hooks
from tests.mover.chains import X, judged
from tests.mover.zoo import Zoo, every_budget, every_device, rig


class Inserting(Zoo):
    """Puts a small network into each block as the block runs, as a hypernetwork does; recomputes blocks during backward."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.extra: list[nn.Module] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x).reshape(-1, 4, 8)
        for number, block in enumerate(self.blocks):
            if number < len(self.extra):
                block.hyper = self.extra[number]
            x = checkpoint(self.inner, x, block, use_reentrant=True) if torch.is_grad_enabled() else self.inner(x, block)
        return self.out(x).sum(1)

    @staticmethod
    def inner(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
        """A leaf comes first."""
        x = x + block.linear(x)
        return block(x + block.hyper(x) if hasattr(block, "hyper") else x)


def extras() -> list[nn.Module]:
    torch.manual_seed(7)
    return [nn.Linear(8, 8) for _ in range(3)]


@every_device
@every_budget
@pytest.mark.parametrize("drained", [False, True])
def test_modules_inserted_during_a_pass_with_gradients(device: str, budget: int, drained: bool) -> None:
    with rig(device, budget, Inserting) as made:
        for _ in range(2):
            made.both(lambda net: setattr(net, "extra", extras()))
            for _ in range(2):
                gradients = []
                for net in (made.net, made.twin):
                    net.zero_grad()
                    with judged(made.streams), torch.enable_grad():
                        net(X.clone().requires_grad_()).square().sum().backward()
                    gradients.append([parameter.grad for module in net.extra for parameter in module.parameters()])
                assert all(gradient is not None for gradient in gradients[0])
                assert all(map(torch.equal, *gradients))
                if drained:
                    made.mover.drain()
            made.passes(2)


@pytest.mark.parametrize("role", ["span", "unit", "observed"])
@pytest.mark.parametrize("again", [False, True])
def test_a_hook_taken_off_by_the_one_before_it(role: str, again: bool) -> None:
    """`again`: and put on anew, so that somebody acts for the module still."""
    heard: list[tuple] = []

    class Moving:
        def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            heard.append((args, kwargs))
            return tuple(arg + 1 for arg in args), kwargs

        def after(self, module: nn.Module) -> None:
            heard.append(("after",))

    leaf = nn.Identity()
    installed = [unit_hooks.Installed(role, leaf, Moving())]

    def takes_it_off(module: nn.Module, args: tuple) -> None:
        installed.pop().remove()
        if again:
            installed.append(unit_hooks.Installed(role, leaf, Moving()))

    handle = leaf.register_forward_pre_hook(takes_it_off, prepend=True)
    assert leaf(X).equal(X + 1 if again else X)
    assert heard == ([((X,), {}), ("after",)] if again else [])
    handle.remove()
