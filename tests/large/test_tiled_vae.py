"""The tiled VAE against the untiled one, on a VAE with realistic statistics; and the simple way, which fails the same test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_async_lowvram.large.rows import Untileable
from lib_async_lowvram.large.tiled_vae import ESTIMATED, EXACT, RECOMPUTED, WHOLE, Limits, run
from lib_async_lowvram.large.vae_steps import steps_of
from tests.large.measures import border_steps, naive_tiles, psnr
from tests.large.realistic_vae import Autoencoder, calibrated, latents, pictures

MB = 1 << 20
PLENTY = 1 << 40
GOOD_PSNR, SEAM = 100.0, 1.25
"""Decibel, that whatever is called exact must reach; and how many times the largest step inside tiles one across a border may be."""


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return calibrated(8)


def inputs(vae: Autoencoder, what: str) -> tuple[nn.Module, torch.Tensor]:
    return (vae.decoder, latents(32, 32)) if what == "decode" else (vae.encoder, pictures(256, 256))


both = pytest.mark.parametrize("what", ["decode", "encode"])
BANDS = 16
"""Of so many rows at most, so that there are borders to look at, at every resolution."""


def borders(height: int) -> list[int]:
    return list(range(BANDS, height, BANDS))


def judged(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert psnr(got, expected) > GOOD_PSNR
    across, inside = border_steps(got, expected, borders(got.shape[2]))
    assert across < 1e-5 and inside < 1e-5  # values are about -1 to 1


@both
@torch.no_grad()
def test_exact_spilled(vae: Autoencoder, what: str) -> None:
    network, x = inputs(vae, what)
    got, report = run(network, x, Limits(4 * MB, PLENTY, most_rows=BANDS))
    judged(got, network(x))
    assert report.mode == EXACT and report.spilled_bytes > 0 and report.rows[1] == BANDS
    assert report.device_bytes <= 1.1 * 4 * MB
    assert report.in_strips == () and report.statistics_error == 0.0


@both
@torch.no_grad()
def test_exact_on_the_device(vae: Autoencoder, what: str) -> None:
    network, x = inputs(vae, what)
    got, report = run(network, x, Limits(64 * MB, 0, most_rows=BANDS))
    judged(got, network(x))
    assert report.mode == EXACT and report.spilled_bytes == report.host_bytes == 0


@both
@torch.no_grad()
def test_as_near_to_float64_as_the_untiled_one(vae: Autoencoder, what: str) -> None:
    network, x = inputs(vae, what)
    got, _ = run(network, x, Limits(4 * MB, PLENTY))
    expected = network(x)
    true = network.double()(x.double())
    network.float()
    assert psnr(got, true) > psnr(expected, true) - 1.0


@torch.no_grad()
def test_recomputed_where_the_host_is_too_small(vae: Autoencoder) -> None:
    network, x = inputs(vae, "encode")
    got, report = run(network, x, Limits(6 * MB, 1200 << 10))
    judged(got, network(x))
    assert report.mode == RECOMPUTED and report.statistics_error < 1e-6
    assert report.in_strips == ("conv_in", "down.0.block.0", "down.0.block.1")
    assert report.host_bytes <= 1200 << 10


@torch.no_grad()
def test_recomputed_decode(vae: Autoencoder) -> None:
    z = latents(16, 16)
    got, report = run(vae.decoder, z, Limits(3 * MB, 300 << 10))
    judged(got, vae.decoder(z))
    assert report.mode == RECOMPUTED and report.statistics_error < 1e-6
    assert report.in_strips[-1] == "norm_out, conv_out" and "conv_in" not in report.in_strips


@both
@torch.no_grad()
def test_estimated_tells_its_error_and_shows_no_seams(vae: Autoencoder, what: str) -> None:
    network, x = inputs(vae, what)
    got, report = run(network, x, Limits(6 * MB, 1200 << 10, estimate=True))
    expected = network(x)
    assert report.mode == ESTIMATED and report.in_strips
    assert 0.001 < report.statistics_error < 0.3
    assert 25 < psnr(got, expected)
    across, inside = border_steps(got, expected, borders(got.shape[2]))
    assert across < SEAM * inside


@torch.no_grad()
def test_the_simple_way_fails_the_same_test(vae: Autoencoder) -> None:
    """Tiles with statistics of their own: seams where they meet, and wrong in tone where they are blended."""
    network, z = inputs(vae, "decode")
    expected = network(z)
    hard, where = naive_tiles(network, z, (16, 32), 0)
    across, inside = border_steps(hard, expected, where)
    assert psnr(hard, expected) < 30 and across > SEAM * inside and across > 0.1
    blended, _ = naive_tiles(network, z, (16, 32), 4)
    assert psnr(blended, expected) < 30


@both
@torch.no_grad()
def test_what_fits_is_the_networks_own_call_bit_for_bit(vae: Autoencoder, what: str) -> None:
    network, x = inputs(vae, what)
    calls: list[tuple] = []
    handle = network.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    for limits in (Limits(PLENTY, 0), Limits(PLENTY, 0, most_rows=256)):
        got, report = run(network, x, limits)
        assert torch.equal(got, network(x)) and report.mode == WHOLE and report.slices == 1
    handle.remove()
    assert len(calls) == 4


@both
@torch.no_grad()
def test_batches_are_sliced(vae: Autoencoder, what: str) -> None:
    network, x = inputs(vae, what)
    batch = torch.cat([x, x.flip(2), -x])[:, :, : x.shape[2] // 2, : x.shape[3] // 2]
    for limits in (Limits(PLENTY, 0, sliced=True), Limits(64 * MB, 0, most_rows=BANDS), Limits(4 * MB, PLENTY)):
        got, report = run(network, batch, limits)
        alone = [run(network, picture, limits)[0] for picture in batch.split(1)]
        assert torch.equal(got, torch.cat(alone)) and report.slices == 3
    whole, report = run(network, batch, Limits(PLENTY, 0))
    assert torch.equal(whole, network(batch)) and report.slices == 1


@pytest.mark.parametrize(("height", "width"), [(13, 9), (8, 21), (3, 5)])
@torch.no_grad()
def test_sizes_that_no_band_divides(vae: Autoencoder, height: int, width: int) -> None:
    for network, x in ((vae.decoder, latents(height, width)), (vae.encoder, pictures(8 * height, 8 * width))):
        got, report = run(network, x, Limits(MB // 2, PLENTY, most_rows=5))
        assert report.mode == EXACT and psnr(got, network(x)) > GOOD_PSNR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types(vae: Autoencoder, dtype: torch.dtype) -> None:
    network = vae.decoder.to(dtype)
    z = latents(16, 16).to(dtype)
    got, _ = run(network, z, Limits(2 * MB, PLENTY))
    expected = network(z)
    again = network.double()(z.double())
    network.float()
    assert got.dtype == dtype
    # bfloat16 rounds at every step: what two ways of adding up may differ by is what either is from the truth.
    assert psnr(got, again) > min(250, psnr(expected, again) - 1.5)


@torch.no_grad()
def test_changes_to_forward_are_followed(vae: Autoencoder) -> None:
    """As LoRA patches it: the weight is changed inside, in the call."""
    network, z = calibrated(8).decoder, latents(16, 16)
    seen = []

    def patched(self: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        seen.append(self)
        self.weight.mul_(1.25)
        return nn.Conv2d.forward(self, x)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.forward = patched.__get__(module)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    got, _ = run(network, z, Limits(2 * MB, PLENTY))
    assert len(seen) == len(set(map(id, seen))) == sum(isinstance(module, nn.Conv2d) for module in network.modules())
    network.load_state_dict(before)
    assert psnr(got, network(z)) > GOOD_PSNR


@torch.no_grad()
def test_each_module_is_called_once_in_the_networks_own_order(vae: Autoencoder) -> None:
    for what in ("decode", "encode"):
        network, x = inputs(vae, what)
        calls: list[nn.Module] = []
        leaves = [module for module in network.modules() if next(module.parameters(recurse=False), None) is not None]
        handles = [leaf.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(module)) for leaf in leaves]
        network(x)
        untiled = calls.copy()
        calls.clear()
        run(network, x, Limits(2 * MB, PLENTY, most_rows=BANDS))
        for handle in handles:
            handle.remove()
        assert calls == untiled and len(calls) == len(leaves)


def test_gradients_are_refused(vae: Autoencoder) -> None:
    with pytest.raises(Untileable, match="gradients"):
        run(vae.decoder, latents(8, 8), Limits(PLENTY, 0))


def _without(name: str) -> Callable[[nn.Module], None]:
    return lambda network: delattr(network, name)


@pytest.mark.parametrize(
    "change",
    [_without("up"), _without("norm_out"), lambda network: setattr(network, "forward", lambda z: z)],
    ids=["no levels", "no norm", "another's tiled VAE"],
)
@torch.no_grad()
def test_networks_of_another_layout_are_refused(change: Callable[[nn.Module], None]) -> None:
    network = calibrated(8).decoder
    change(network)
    with pytest.raises(Untileable):
        run(network, latents(8, 8), Limits(MB, PLENTY))


def test_the_steps_are_the_networks(vae: Autoencoder) -> None:
    names = [step.name for step in steps_of(vae.decoder)]
    assert names[:5] == ["conv_in", "mid.block_1", "mid.attn_1", "mid.block_2", "up.3.block.0"]
    assert names[-4:] == ["up.0.block.0", "up.0.block.1", "up.0.block.2", "norm_out, conv_out"]
    assert [float(step.scale) for step in steps_of(vae.decoder)][-1] == 8
    names = [step.name for step in steps_of(vae.encoder)]
    assert names[:4] == ["conv_in", "down.0.block.0", "down.0.block.1", "down.0.downsample"]
    assert names[-3:] == ["mid.attn_1", "mid.block_2", "norm_out, conv_out"]
