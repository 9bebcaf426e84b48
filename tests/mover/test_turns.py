"""A pass waits while another thread is in the middle of one."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, attached, call, on_thread, pair, recorded, same, simulated

PATIENCE = 60
BUDGETS = [1, 5 * LEAF_BYTES, 1 << 20]


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("same_network", [True, False])
def test_a_pass_that_another_thread_wants_to_start_waits_for_the_one_that_runs(passes: int, same_network: bool) -> None:
    """The WebUI's first picture may be asked for while the thread that loads the model still encodes its empty prompt."""
    streams = recorded()
    net, twin = pair()
    other, other_twin = (net, twin) if same_network else pair(lambda: Chain(4))
    mover = attached(net, streams, passes=passes)
    if not same_network:
        mover.attach({"other": other})
    inside, waiting = threading.Event(), threading.Event()
    wait = mover._context.turn.wait

    def told(timeout: float) -> bool:
        waiting.set()
        return wait(timeout)

    mover._context.turn.wait = told

    def until_the_other_waits(_: Leaf) -> None:
        inside.set()
        assert waiting.wait(PATIENCE)

    net.leaves[3].inside = until_the_other_waits
    results: dict[str, torch.Tensor] = {}

    def first() -> None:
        results["first"] = call(net, streams)

    def second() -> None:
        assert inside.wait(PATIENCE)
        results["second"] = call(other, streams)

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    with torch.no_grad():
        assert torch.equal(results["first"], twin(X))
        assert torch.equal(results["second"], other_twin(X))
    assert mover.status()["placement_faults"] == 0
    mover.detach()
    streams.check()


def test_patience_with_another_threads_pass_ends(monkeypatch) -> None:
    """It might be waiting for this one; and its picture stays right."""
    monkeypatch.setattr("lib_async_lowvram.turns.PATIENCE_SECONDS", 0)
    streams = simulated()
    net, twin = pair()
    other, _ = pair(lambda: Chain(4))
    mover = attached(net, streams)
    mover.attach({"other": other})
    errors: list[Exception] = []

    def call_the_other() -> None:
        try:
            call(other, streams)
        except RuntimeError as error:
            errors.append(error)

    def on_a_thread(_: Leaf) -> None:
        thread = threading.Thread(target=call_the_other)
        thread.start()
        thread.join(PATIENCE)

    net.leaves[3].inside = on_a_thread
    with torch.no_grad():
        assert torch.equal(net(X), twin(X))
    assert "has not ended" in str(errors[0])
    same(net, twin, streams)
    mover.detach()


@pytest.mark.parametrize("passes", [0, 2])
def test_a_network_detached_while_a_thread_waits_to_run_it(passes: int) -> None:
    """The thread that waited finds ordinary modules; nothing of ours comes back to them."""
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, passes=passes)
    inside, waiting = threading.Event(), threading.Event()
    wait = mover._context.turn.wait

    def told(timeout: float) -> bool:
        waiting.set()
        return wait(timeout)

    mover._context.turn.wait = told

    def until_the_other_waits(_: Leaf) -> None:
        net.leaves[3].inside = None
        inside.set()
        assert waiting.wait(PATIENCE)
        on_thread(mover.detach)  # put off until this pass ends

    net.leaves[3].inside = until_the_other_waits
    results: dict[str, torch.Tensor] = {}

    def first() -> None:
        results["first"] = call(net, streams)

    def second() -> None:
        assert inside.wait(PATIENCE)
        with torch.no_grad():
            results["second"] = net(X)

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    with torch.no_grad():
        assert torch.equal(results["first"], twin(X))
        assert torch.equal(results["second"], twin(X))
    assert not mover.is_attached
    assert streams.allocated_bytes == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    streams.check()
