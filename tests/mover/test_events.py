"""Whatever a host does to a managed model, in any sequence: every pass stays bit for bit that of the plain twin.

An event is a name and a number that seeds its choices. What it does to the managed tree it does to the twin.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import suppress

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib_async_lowvram import OffloadConfig
from lib_async_lowvram.large.chunks import in_chunks, no_hold
from tests.mover.chains import handed_over, judged
from tests.mover.trees import WIDTH, Attend, Case, Cast, Net, build


class Stop(BaseException):
    """As the WebUI's interrupt: post hooks do not run for it."""


def owners(net: Net) -> list[str]:
    """Modules that own parameters, but for those that never fire by themselves."""
    silent = {f"{name}.attention.out_proj" for name, module in net.named_modules() if isinstance(module, Attend)}
    return [name for name, module in net.named_modules() if name not in silent and any(p is not None for p in module._parameters.values())]


def change(net: Net, name: str, how: str, number: int) -> None:
    """One change to the weights of one module."""
    module = net.get_submodule(name)
    held = [key for key, parameter in module._parameters.items() if parameter is not None]
    key = held[number % len(held)]
    parameter = module._parameters[key]
    with torch.no_grad():
        if how == "write":
            parameter.mul_(0.5)
        elif how == "replace":
            setattr(module, key, nn.Parameter(parameter.detach() * 0.5))
        elif how == "assign":
            parameter.data = parameter.detach() * 0.5
        elif isinstance(module, Cast):  # "bias"
            module.shift = nn.Parameter(torch.linspace(-1, 1, WIDTH)) if module.shift is None else None


CHANGES = ["write", "write", "replace", "assign", "bias"]


class Play:
    """The events, by method name."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.now = 0
        self.next: tuple[Net, Net] | None = None  # another network on the same mover, once one was expected, and its twin

    def pass_(self, order: list[int] | None = None) -> None:
        self.now += 1
        self.case.run(self.now, order)

    # -- between passes ------------------------------------------------------------------------------------------------
    def other_order(self, chance: random.Random) -> None:
        blocks = len(self.case.net.blocks)
        self.pass_([chance.randrange(blocks) for _ in range(chance.randint(1, blocks + 1))])

    def drain(self, chance: random.Random) -> None:
        if chance.random() < 0.5:
            handed_over(self.case.mover.drain, self.case.streams)
        else:
            self.case.mover.drain()

    def prepare(self, chance: random.Random) -> None:
        with torch.no_grad():
            self.case.mover.prepare("net")

    def expect(self, chance: random.Random) -> None:
        """Another network is fetched while this one runs; then it is its turn, or not."""
        case = self.case
        if self.next is None:
            self.next = build(case.seed + 1), build(case.seed + 1)
            case.mover.attach({"next": self.next[0]})
            self._next_pass()
            self._next_pass()
            self.pass_()
        if chance.random() < 0.8:
            self.pass_()  # so that it is entered
        case.mover.expect("next")
        inside = [lambda: self.drain_inside(chance), lambda: self.error(chance), lambda: self.interrupt(chance)]
        how = chance.choice([self.pass_, self.pass_, self.pass_, *inside])
        how()
        if chance.random() < 0.4:
            name, change_how, number = chance.choice(owners(self.next[0])), chance.choice(CHANGES), chance.randrange(4)
            for net in self.next:
                change(net, name, change_how, number)
        if chance.random() < 0.2:
            case.mover.masters(["net", "next"])
        if chance.random() < 0.6:
            self._next_pass()

    def _next_pass(self) -> None:
        x = torch.randn(2, 4, WIDTH)
        with torch.no_grad():
            expected = self.next[1](x)
        with judged(self.case.streams):
            assert torch.equal(self.next[0](x), expected)

    def configure(self, chance: random.Random) -> None:
        self.case.mover.configure(
            OffloadConfig(
                budget_bytes=chance.randint(1, 2 * self.case.weight_bytes),
                lookahead_bytes=chance.choice([0, 5_000, 100_000]),
                small_leaf_bytes=chance.choice([0, 300]),
                pinned_limit_bytes=chance.choice([0, 0, 20_000]),
                check_placement=True,
            )
        )

    def change_outside(self, chance: random.Random) -> None:
        name, how, number = chance.choice(owners(self.case.net)), chance.choice(CHANGES), chance.randrange(4)
        for net in (self.case.net, self.case.twin):
            change(net, name, how, number)

    def reload(self, chance: random.Random) -> None:
        weights = copy.deepcopy(self.case.net.state_dict())
        with torch.no_grad():
            weights = {key: value * 0.75 for key, value in weights.items()}
        for net in (self.case.net, self.case.twin):
            net.load_state_dict(weights)

    def clone(self, chance: random.Random) -> None:
        clone = copy.deepcopy(self.case.net)
        x = torch.randn(2, 4, WIDTH)
        with torch.no_grad():
            assert torch.equal(clone(x), self.case.twin(x))

    def stray(self, chance: random.Random) -> None:
        leaves = [name for name, _ in self.case.net.named_modules() if name.count(".") == 3]
        name, x = chance.choice(leaves), torch.randn(2, 4, WIDTH)
        with torch.no_grad():
            expected = self.case.twin.get_submodule(name)(x)
        with judged(self.case.streams):
            assert torch.equal(self.case.net.get_submodule(name)(x), expected)

    def hog(self, chance: random.Random) -> None:
        case = self.case
        case.mover.drain()
        left = chance.randint(0, 2 * case.weight_bytes)
        hog = case.inner.allocate(max(0, case.inner.free_memory() - left))
        x = torch.randn(2, 4, WIDTH)
        with suppress(torch.cuda.OutOfMemoryError), judged(case.streams):
            got = case.net(x)
            with torch.no_grad():
                assert torch.equal(got, case.twin(x))
        case.mover.drain()
        case.inner.free(hog)
        assert case.inner.allocated_bytes == 0

    # -- inside passes -------------------------------------------------------------------------------------------------
    def change_inside(self, chance: random.Random) -> None:
        name, how, number = chance.choice(owners(self.case.net)), chance.choice(CHANGES), chance.randrange(4)
        self._once(name, lambda net: change(net, name, how, number))

    def _once(self, name: str, action: Callable[[Net], None]) -> None:
        """A pass of both in which `action` happens when the named module is first called."""
        handles = []
        for net in (self.case.net, self.case.twin):
            done: list[bool] = []

            def hook(module: nn.Module, args: tuple, net: Net = net, done: list[bool] = done) -> None:
                if not done:
                    done.append(True)
                    action(net)

            handles.append(net.get_submodule(name).register_forward_pre_hook(hook))
        try:
            self.pass_()
        finally:
            for handle in handles:
                handle.remove()

    def drain_inside(self, chance: random.Random) -> None:
        case = self.case
        self._once(chance.choice(owners(case.net)), lambda net: handed_over(case.mover.drain, case.streams) if net is case.net else None)

    def error(self, chance: random.Random) -> None:
        self._cut_short(chance, ValueError())

    def interrupt(self, chance: random.Random) -> None:
        self._cut_short(chance, Stop())

    def _cut_short(self, chance: random.Random, error: BaseException) -> None:
        net = self.case.net

        def stop(*_: object) -> None:
            raise error

        handle = net.get_submodule(chance.choice(owners(net))).register_forward_pre_hook(stop)
        x = torch.randn(2, 4, WIDTH)
        gradients = chance.random() < 0.2
        with suppress(type(error)), judged(self.case.streams), torch.set_grad_enabled(gradients):
            net(x)
        handle.remove()

    def chunked(self, chance: random.Random) -> None:
        """Each block's leaves, or blocks as a whole, run twice in a row, under a hold or without one."""
        limit, hold = chance.choice([5_000, 1 << 30]), chance.choice([self.case.mover.holding, self.case.mover.holding, no_hold])
        with in_chunks(self.case.twin, 2, limit), in_chunks(self.case.net, 2, limit, hold):
            chance.choice([self.pass_, lambda: self.change_inside(chance), lambda: self.drain_inside(chance), lambda: self.error(chance)])()

    def other_thread(self, chance: random.Random) -> None:
        handed_over(self.pass_, self.case.streams)

    def gradients(self, chance: random.Random) -> None:
        x = torch.randn(2, 4, WIDTH)
        with judged(self.case.streams), torch.enable_grad():
            got = self.case.net(x)
        assert torch.equal(got, self.case.twin(x))


EVENTS = [name for name, value in vars(Play).items() if callable(value) and not name.startswith("_") and name != "pass_"]


@settings(max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.2, 0.5, 0.9, 2.0]),
    whole=st.booleans(),
    jitter=st.sampled_from([0.0, 2e-4]),
    poison=st.booleans(),
    in_file=st.booleans(),
    events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 99)), min_size=3, max_size=12),
)
def test_any_sequence_of_events(
    seed: int, share: float, whole: bool, jitter: float, poison: bool, in_file: bool, events: list[tuple[str, int]]
) -> None:
    with Case(seed, share=share, whole=whole, jitter=jitter, bandwidth=1e8 if jitter else 1e12, in_file=in_file) as case:
        case.inner.poison = poison
        play = Play(case)
        play.pass_()
        play.pass_()
        for name, number in events:
            getattr(play, name)(random.Random(number))
            play.pass_()
        case.streams.check()
        status = case.mover.status()
        assert status["placement_faults"] == 0, status["last_error"]
        assert status["state"] in ("active", "learning"), status
