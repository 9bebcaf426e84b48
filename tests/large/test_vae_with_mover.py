"""The tiled VAE over the mover on the simulated device: the same bits as without it, and each unit's bytes once per decode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.large.tiled_vae import EXACT, RECOMPUTED, Limits, run
from tests.large.realistic_vae import calibrated, latents, pictures
from tests.mover.chains import OPEN, judged, recorded, simulated

MB = 1 << 20
SPILLED = Limits(MB, 1 << 40, most_rows=16)


@pytest.fixture(autouse=True)
def close_devices():
    yield
    while OPEN:
        OPEN.pop().close()


def managed(network: nn.Module, streams, share: float) -> AsyncModelMover:
    """As the WebUI holds it: one region, passes opened by the caller. `share` of the weights is the budget."""
    nbytes = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    config = OffloadConfig(budget_bytes=max(1, int(share * nbytes)), small_leaf_bytes=0, check_placement=True)
    mover = AsyncModelMover(config, streams)
    mover.attach({"vae": NetworkSpec([Region(network)], None)})
    # The plan that it learns is the one it keeps: what was measured since may be reason for another one at any time.
    mover._networks["vae"].planning.better = lambda *_: None
    return mover


def one_pass(mover: AsyncModelMover, streams, network: nn.Module, x: torch.Tensor, limits: Limits | None) -> tuple:
    """(result, report or None, bytes streamed, misses) of one pass, untiled without limits."""
    before = mover.status()
    with judged(streams), mover.running("vae"):
        got, report = (network(x), None) if limits is None else run(network, x, limits)
    after = mover.status()
    assert after["placement_faults"] == 0, after["last_error"]
    return got, report, after["streamed_bytes"] - before["streamed_bytes"], after["misses"] - before["misses"]


@pytest.mark.parametrize("device", [recorded, lambda: simulated(bandwidth=2e8, latency=1e-5, jitter_seconds=1e-4, seed=5)])
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["least budget", "half"])
@pytest.mark.parametrize("what", ["decode", "encode"])
def test_same_bits_and_each_unit_once(what: str, share: float, device) -> None:
    networks = [getattr(calibrated(8), f"{what}r") for _ in range(2)]
    x = latents(12, 12) if what == "decode" else pictures(96, 96)
    streams = device()
    network, twin = networks
    mover = managed(network, streams, share)
    with torch.no_grad():
        expected, _ = run(twin, x, SPILLED)
        untiled = twin(x)
    one_pass(mover, streams, network, x, None)  # learns
    one_pass(mover, streams, network, x, None)  # residents arrive
    got, _, once, _ = one_pass(mover, streams, network, x, None)
    assert torch.equal(got, untiled)
    for _ in range(2):
        got, report, streamed, misses = one_pass(mover, streams, network, x, SPILLED)
        assert torch.equal(got, expected) and report.mode == EXACT and report.bands > 90 and report.spilled_bytes
        assert (streamed, misses) == (once, 0) and streamed > 0
    mover.detach()


def test_the_first_pass_may_be_a_tiled_one() -> None:
    """What the mover learns from it is what it learns from an untiled one."""
    network, twin = calibrated(8).decoder, calibrated(8).decoder
    z, streams = latents(12, 12), recorded()
    mover = managed(network, streams, 0.0)
    with torch.no_grad():
        expected, _ = run(twin, z, SPILLED)
        untiled = twin(z)
    for _ in range(3):
        got, _, once, misses = one_pass(mover, streams, network, z, SPILLED)
        assert torch.equal(got, expected) and misses == 0
    got, _, streamed, misses = one_pass(mover, streams, network, z, None)
    assert torch.equal(got, untiled) and (streamed, misses) == (once, 0)
    streams.check()
    mover.detach()


def test_strips_stream_their_steps_once_each() -> None:
    """Recomputed: the steps that do not fit run once per strip and sweep. Their weights come as often, and are right each time."""
    network, twin = calibrated(8).encoder, calibrated(8).encoder
    x, streams = pictures(128, 128), recorded()
    limits = Limits(2 * MB, 200 << 10)
    mover = managed(network, streams, 0.0)
    with torch.no_grad():
        expected, _ = run(twin, x, limits)
    for _ in range(2):
        got, report, _, _ = one_pass(mover, streams, network, x, limits)
        assert torch.equal(got, expected) and report.mode == RECOMPUTED
    mover.detach()


def test_an_error_in_the_middle_leaves_the_next_decode_right() -> None:
    network, twin = calibrated(8).decoder, calibrated(8).decoder
    z, streams = latents(12, 12), recorded()
    mover = managed(network, streams, 0.0)
    with torch.no_grad():
        expected, _ = run(twin, z, SPILLED)
    for _ in range(2):
        one_pass(mover, streams, network, z, SPILLED)

    def fail(module: nn.Module, args: tuple) -> None:
        raise KeyboardInterrupt

    handle = network.up[1].block[1].conv2.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        one_pass(mover, streams, network, z, SPILLED)
    handle.remove()
    for _ in range(2):
        got, *_ = one_pass(mover, streams, network, z, SPILLED)
        assert torch.equal(got, expected)
    mover.detach()


@pytest.mark.parametrize("pinned_limit", [1, MB, 1 << 40])
def test_spilled_activations_in_the_movers_host_memory(pinned_limit: int) -> None:
    """Pinned within its limit, the same bits either way, and given back."""
    decoder, z, streams = calibrated(8).decoder, latents(16, 16), simulated()
    host = HostMemory(streams, pinned_limit)
    with torch.no_grad():
        expected, plain = run(decoder, z, SPILLED)
        got, report = run(decoder, z, SPILLED, host)
    assert torch.equal(got, expected) and report.host_bytes == plain.host_bytes > MB
    assert min(report.pinned_bytes, 1) == min(pinned_limit // MB, 1) and plain.pinned_bytes == 0
    assert report.pinned_bytes <= min(report.host_bytes, pinned_limit)
    assert host.host_bytes == host.pinned_bytes == 0
