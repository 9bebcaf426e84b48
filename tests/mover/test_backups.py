"""Backups of weights: from the master where it holds the same bytes, and restored only where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover
from tests.mover.chains import LEAF_BYTES, Leaf, attached, pair, recorded, same, simulated

BUDGETS = [1, 5 * LEAF_BYTES, 1 << 20]


def inside(net: nn.Module, place: int, do: Callable[[Leaf], None]) -> None:
    net.leaves[place].inside = do


def both(net: nn.Module, twin: nn.Module, place: int, do: Callable[[Leaf], None]) -> None:
    inside(net, place, do)
    inside(twin, place, do)


class Patcher:
    """Backs up, patches and restores as LoRA does, with the mover's help; `taken` and `restored` count what crossed the link."""

    def __init__(self, mover: AsyncModelMover) -> None:
        self._backups = mover.backups
        self.kept: dict[int, torch.Tensor] = {}
        self.taken = self.restored = 0

    def store(self, leaf: Leaf) -> None:
        weight = leaf.weight
        backup = self._backups.copy(weight)
        if backup is None:
            self.taken += 1
            backup = weight.to("cpu", copy=True)
        assert torch.equal(backup, weight) and backup.data_ptr() != weight.data_ptr() and backup.stride() == weight.stride()
        self._backups.note(weight, backup)
        self.kept[id(leaf)] = backup

    def restore(self, leaf: Leaf) -> None:
        backup = self.kept[id(leaf)]
        if not self._backups.holds(leaf.weight, backup):
            self.restored += 1
            leaf.weight.copy_(backup)
            self._backups.note(leaf.weight, backup)
        assert torch.equal(leaf.weight, backup)


def add(leaf: Leaf) -> None:
    leaf.weight += 0.25


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_backup_comes_from_the_master_and_what_nobody_changed_is_not_restored(budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    patcher = Patcher(mover)

    def start(leaf: Leaf) -> None:
        patcher.store(leaf)
        patcher.restore(leaf)

    inside(net, 2, start)
    same(net, twin, streams)
    inside(net, 2, patcher.restore)
    same(net, twin, streams)
    mover.drain()
    inside(net, 2, patcher.restore)
    same(net, twin, streams)
    assert (patcher.taken, patcher.restored) == (0, 0)
    status = mover.status()
    assert status["write_backs"] + status["adopted"] == 0
    assert (status["backup_bytes_from_masters"], status["restore_bytes_spared"]) == (LEAF_BYTES, 3 * LEAF_BYTES)
    assert status["placement_faults"] == 0
    mover.detach()
    streams.check()


@pytest.mark.parametrize("budget", BUDGETS)
def test_patched_and_restored(budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    patcher = Patcher(mover)
    inside(net, 3, lambda leaf: (patcher.store(leaf), patcher.restore(leaf), add(leaf)))
    inside(twin, 3, add)
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["write_backs"] == 1
    inside(net, 3, patcher.restore)
    inside(twin, 3, lambda leaf: leaf.weight.copy_(patcher.kept[id(net.leaves[3])]))
    for _ in range(2):
        same(net, twin, streams)
    inside(net, 3, patcher.restore)
    same(net, twin, streams)
    assert (patcher.taken, patcher.restored) == (0, 1)
    assert mover.status()["write_backs"] == 2
    mover.detach()
    streams.check()


def test_a_changed_weight_has_no_backup_at_its_master_before_it_is_written_back() -> None:
    net, twin = pair()
    streams = simulated()
    mover = attached(net, streams, 1 << 20)
    patcher = Patcher(mover)
    both(net, twin, 1, add)
    inside(net, 1, lambda leaf: (add(leaf), patcher.store(leaf)))
    same(net, twin, streams)
    assert patcher.taken == 1
    inside(net, 1, patcher.store)  # written back at the pass's end
    same(net, twin, streams)
    assert patcher.taken == 1
    mover.detach()


def replace(leaf: Leaf) -> None:
    leaf.weight = nn.Parameter(leaf.weight * 2)


def assign(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight * 2


def to_half(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight.half()


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("change", [add, replace, assign, to_half])
def test_what_somebody_else_changed_is_restored(change: Callable[[Leaf], None], between: bool) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 5 * LEAF_BYTES)
    patcher = Patcher(mover)
    original = twin.leaves[2].weight.detach().clone()
    inside(net, 2, patcher.store)
    same(net, twin, streams)
    if between:
        with torch.no_grad():
            change(net.leaves[2])
            change(twin.leaves[2])
    else:
        both(net, twin, 2, change)
    same(net, twin, streams)
    expected = original.to(twin.leaves[2].weight.dtype)

    def restore(leaf: Leaf) -> None:
        assert not mover.backups.holds(leaf.weight, patcher.kept[id(net.leaves[2])])
        leaf.weight.copy_(original)

    both(net, twin, 2, lambda leaf: restore(leaf) if leaf is net.leaves[2] else leaf.weight.copy_(original))
    same(net, twin, streams)
    assert torch.equal(twin.leaves[2].weight, expected)
    mover.detach()


def test_an_untraced_change_that_was_told_of_is_restored() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 5 * LEAF_BYTES)
    patcher = Patcher(mover)
    inside(net, 2, patcher.store)
    same(net, twin, streams)
    mover.drain()
    for each in (net, twin):
        each.leaves[2].weight.data.mul_(2)
    mover.mark_dirty(net.leaves[2])
    same(net, twin, streams)
    seen = []
    inside(net, 2, lambda leaf: seen.append(mover.backups.holds(leaf.weight, patcher.kept[id(leaf)])))
    same(net, twin, streams)
    assert seen == [False]
    mover.detach()


def test_nothing_is_known_outside_a_pass_of_strangers_or_where_writes_leave_no_trace() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 1)
    assert mover.backups.copy(net.leaves[0].weight) is None  # on the host: whoever wants a copy takes it there
    stranger = nn.Parameter(torch.ones(2))
    mover.backups.note(stranger, stranger.detach())
    assert mover.backups.copy(stranger) is None
    assert not mover.backups.holds(stranger, stranger.detach())
    mover.drain()
    assert mover.backups.copy(net.leaves[0].weight) is None
    mover.detach()
    mover = attached(net, streams, 1, always_write_back=True)
    got = []
    inside(net, 0, lambda leaf: got.append(mover.backups.copy(leaf.weight)))
    same(net, twin, streams)
    assert got == [None]
    mover.detach()
