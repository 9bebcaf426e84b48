"""The tiled VAE on diffusers' AutoencoderKL: what its own untiled encode and decode give, in bands, spilled to the host and to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from lib_async_lowvram.large.diffusers_vae import as_convolution, attention_parts
from lib_async_lowvram.large.disk_room import DiskRoom
from lib_async_lowvram.large.rows import Untileable
from lib_async_lowvram.large.tiled_vae import EXACT, RECOMPUTED, WHOLE, Limits, run
from lib_async_lowvram.large.vae_layouts import kind_of, steps_of
from lib_async_lowvram.standalone.families import SD15
from tests.large.measures import border_steps, psnr

MB = 1 << 20
PLENTY = 1 << 40
GOOD_PSNR = 100.0
BANDS = 16


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    config = {**SD15.vae, "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8}
    torch.manual_seed(4)
    made = AutoencoderKL(**config).eval().requires_grad_(False)
    for module in made.modules():
        if isinstance(module, nn.GroupNorm):  # what norms do must show
            module.weight.normal_(1, 0.2)
            module.bias.normal_(0, 0.2)
    return made


def inputs(vae: nn.Module, what: str) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    if what == "decode":
        return vae.decoder, torch.randn(1, 4, 32, 24, generator=generator)
    return vae.encoder, torch.rand(1, 3, 256, 192, generator=generator) * 2 - 1


both = pytest.mark.parametrize("what", ["decode", "encode"])


def judged(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    peak = float(expected.max() - expected.min())
    assert psnr(got, expected, peak) > GOOD_PSNR
    across, inside = border_steps(got, expected, list(range(BANDS, got.shape[2], BANDS)))
    assert across < 1e-5 * peak and inside < 1e-5 * peak


@both
@torch.no_grad()
@pytest.mark.parametrize("device_bytes", [2 * MB, 64 * MB])
def test_exact(vae: nn.Module, what: str, device_bytes: int) -> None:
    """With 2 MB the attention goes through `chunked_attention`, its projections as convolutions; with 64 MB it is the module's own."""
    network, x = inputs(vae, what)
    got, report = run(network, x, Limits(device_bytes, PLENTY, most_rows=BANDS))
    assert report.mode == EXACT and (report.spilled_bytes > 0) == (device_bytes == 2 * MB)
    judged(got, network(x))


@both
@torch.no_grad()
def test_spilled_to_disk(vae: nn.Module, what: str, tmp_path: Path) -> None:
    network, x = inputs(vae, what)
    disk = DiskRoom(tmp_path)
    got, report = run(network, x, Limits(2 * MB, PLENTY, most_rows=BANDS), disk=disk)
    assert report.mode == EXACT and disk.written_bytes == report.spilled_bytes > 0 and report.pinned_bytes == 0
    judged(got, network(x))
    assert list(tmp_path.iterdir()) == []


@both
@torch.no_grad()
def test_recomputed(vae: nn.Module, what: str) -> None:
    network, x = inputs(vae, what)
    got, report = run(network, x, Limits(6 * MB, 0))
    assert report.mode == RECOMPUTED and report.in_strips
    judged(got, network(x))


@both
@torch.no_grad()
def test_whole_where_it_fits(vae: nn.Module, what: str) -> None:
    network, x = inputs(vae, what)
    got, report = run(network, x, Limits(PLENTY, 0))
    assert report.mode == WHOLE and torch.equal(got, network(x))


@both
@torch.no_grad()
def test_steps_one_by_one_are_the_network(vae: nn.Module, what: str) -> None:
    network, x = inputs(vae, what)
    found = x
    for step in steps_of(network):
        found = step.run(found)
    assert torch.equal(found, network(x)) and kind_of(network) == what + "r"


def test_scales(vae: nn.Module) -> None:
    assert float(steps_of(vae.decoder)[-1].scale) == 8 and float(steps_of(vae.encoder)[-1].scale) == 1 / 8
    names = dict(vae.decoder.named_modules())
    assert all(step.name in names for step in steps_of(vae.decoder)[:-1])


@torch.no_grad()
def test_a_projection_is_called_itself(vae: nn.Module) -> None:
    linear = vae.decoder.mid_block.attentions[0].to_q
    x = torch.randn(1, 64, 4, 3, generator=torch.Generator().manual_seed(1))
    seen = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    try:
        found = as_convolution(linear)(x)
    finally:
        handle.remove()
    expected = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(found, expected, atol=1e-6) and seen == [x.shape] and "forward" not in vars(linear)


def test_what_is_left_alone(vae: nn.Module) -> None:
    attention = vae.decoder.mid_block.attentions[0]
    assert attention_parts(nn.Conv2d(1, 1, 1)) is None
    attention.heads = 2
    try:
        with pytest.raises(Untileable, match="heads"):
            attention_parts(attention)
    finally:
        attention.heads = 1
    vae.decoder.forward = vae.decoder.forward
    try:
        with pytest.raises(Untileable, match="replaced the decoder's own forward"):
            steps_of(vae.decoder)
    finally:
        del vae.decoder.forward
    with pytest.raises(Untileable, match="neither"):
        kind_of(nn.Linear(1, 1))


@torch.no_grad()
def test_progress_reaches_the_end(vae: nn.Module) -> None:
    network, x = inputs(vae, "decode")
    shares: list[float] = []
    run(network, torch.cat([x, x]), Limits(2 * MB, PLENTY), moved=shares.append)
    assert shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[-1] == 1.0
