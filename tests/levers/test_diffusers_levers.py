"""The memory levers that diffusers documents, beside the mover: same bits with it and without it, alone and two at a time.

Needs the extra `standalone` (and accelerate for its part); on tiny models of diffusers' own classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.claims import Refused
from lib_async_lowvram.device.simulated import SimulatedStreams

diffusers = pytest.importorskip("diffusers", reason="the extra `standalone`")

PASSES = 3


@dataclass(frozen=True)
class Lever:
    """Of two of one `kind` only one can be used. `of`: unet or vae."""

    name: str
    kind: str
    prepare: Callable[[nn.Module], object]
    of: str = "unet"
    why_not: str = ""


def layerwise(module: nn.Module) -> None:
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def processor(name: str) -> Callable[[nn.Module], object]:
    return lambda module: module.set_attn_processor(getattr(diffusers.models.attention_processor, name)())


XFORMERS = "" if find_spec("xformers") and torch.cuda.is_available() else "xformers' kernels need CUDA"
LEVERS = [
    Lever("fp16", "precision", lambda unet: unet.half()),
    Lever("fp8 layerwise casting", "precision", layerwise),
    Lever("channels_last", "format", lambda unet: unet.to(memory_format=torch.channels_last)),
    Lever("attention slicing", "attention", lambda unet: unet.set_attention_slice("max")),
    Lever("SDP", "attention", processor("AttnProcessor2_0")),
    Lever("no SDP", "attention", processor("AttnProcessor")),
    Lever("xformers", "attention", lambda unet: unet.enable_xformers_memory_efficient_attention(), why_not=XFORMERS),
    Lever("fused projections", "projections", lambda unet: unet.fuse_qkv_projections()),
    Lever("FreeU", "filter", lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4)),
    Lever("VAE slicing", "slicing", lambda vae: vae.enable_slicing(), "vae"),
    Lever("VAE tiling", "tiling", lambda vae: vae.enable_tiling(), "vae"),
    Lever("VAE fp16", "precision", lambda vae: vae.half(), "vae"),
    Lever("VAE channels_last", "format", lambda vae: vae.to(memory_format=torch.channels_last), "vae"),
]
BROKEN = {
    "fused projections": {"attention slicing", "no SDP", "SDP", "fp8 layerwise casting"},  # fusing brings a processor, and makes new layers
    "FreeU": {"fp16"},  # a CPU has no Fourier transform in half precision
}
"""Without the mover, too."""


def pairs() -> list[tuple[Lever, ...]]:
    found: list[tuple[Lever, ...]] = [(lever,) for lever in LEVERS]
    for one, other in combinations(LEVERS, 2):
        apart = other.name in BROKEN.get(one.name, ()) or one.name in BROKEN.get(other.name, ())
        if one.kind != other.kind and one.of == other.of and not apart:
            found.append((one, other))
    return found


def unet(levers: tuple[Lever, ...]) -> nn.Module:
    torch.manual_seed(0)
    made = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8, norm_num_groups=8,
    ).eval()  # fmt: skip
    return _with(made, levers)


def vae(levers: tuple[Lever, ...]) -> nn.Module:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = diffusers.AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=16, **kinds
    ).eval()
    return _with(made, levers)


def _with(made: nn.Module, levers: tuple[Lever, ...]) -> nn.Module:
    for lever in levers:
        lever.prepare(made)
    return made


def run(module: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)

    def drawn(*shape: int) -> torch.Tensor:
        half = any(parameter.dtype is torch.float16 for parameter in module.parameters())
        return torch.randn(*shape, generator=generator).to(torch.float16 if half else torch.float32)

    with torch.no_grad():
        if isinstance(module, diffusers.AutoencoderKL):
            return module.decode(drawn(2, 4, 24, 24)).sample
        return module(drawn(2, 4, 16, 16), torch.tensor(500 - step), drawn(2, 7, 32)).sample


def network(module: nn.Module) -> dict[str, nn.Module]:
    """What runs as one pass: the VAE's decoder is called by a method, not by the VAE's forward."""
    return {"vae": module.decoder} if isinstance(module, diffusers.AutoencoderKL) else {"unet": module}


@pytest.mark.parametrize("levers", pairs(), ids=lambda levers: " + ".join(lever.name for lever in levers))
def test_same_bits(levers: tuple[Lever, ...]) -> None:
    for lever in levers:
        if lever.why_not:
            pytest.skip(lever.why_not)
    make = vae if levers[0].of == "vae" else unet
    plain, moved = make(levers), make(levers)
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=2e9, latency=1e-5, jitter_seconds=1e-4, seed=5)
    try:
        with AsyncModelMover(OffloadConfig(budget_bytes=160 << 10, small_leaf_bytes=0, check_placement=True), streams) as mover:
            mover.attach(network(moved))
            for step in range(PASSES):
                expected = run(plain, step)
                assert expected.isfinite().all() and torch.equal(expected, run(moved, step)), f"pass {step}"
            status = mover.status()
            (figures,) = status["networks"].values()
            assert status["state"] == "active" and status["placement_faults"] == 0 and not mover.demoted, status["last_error"]
            assert figures["streamed_bytes"] > 0
            assert status["peak_weight_bytes"] <= figures["budget_bytes"] < figures["weight_bytes"]
    finally:
        streams.close()


# -- what moves weights itself -------------------------------------------------------------------------------------------------
@pytest.fixture
def mover():
    streams = SimulatedStreams(capacity_bytes=64 << 20)
    with AsyncModelMover(OffloadConfig(small_leaf_bytes=0), streams) as made:
        yield made
    streams.close()


def test_sequential_and_model_offload_are_refused(mover: AsyncModelMover) -> None:
    accelerate = pytest.importorskip("accelerate", reason="diffusers' offloading is accelerate's")
    cpu = torch.device("cpu")
    for offload in (lambda net: accelerate.cpu_offload(net, cpu), lambda net: accelerate.cpu_offload_with_hook(net, cpu)):
        net, plain = unet(()), unet(())
        offload(net)
        with pytest.raises(Refused, match="is moved by accelerate .* take its hooks off first"):
            mover.attach({"unet": net})
        assert not mover.is_attached
        accelerate.hooks.remove_hook_from_module(net, recurse=True)  # as the message says
        mover.attach({"unet": net})
        for step in range(PASSES):
            assert torch.equal(run(net, step), run(plain, step))
        mover.detach()


def test_group_offloading_is_refused(mover: AsyncModelMover) -> None:
    net = unet(())
    # As `apply_group_offloading` registers itself, which needs an accelerator to begin with.
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(net.conv_in)
    registry.register_hook(diffusers.hooks.ModelHook(), "group_offloading")
    with pytest.raises(Refused, match="^conv_in .* is moved by diffusers' group offloading: use one of the two"):
        mover.attach({"unet": net})
    assert not mover.is_attached


def test_offloaded_by_accelerate_afterwards_it_still_computes_the_same(mover: AsyncModelMover) -> None:
    accelerate = pytest.importorskip("accelerate")
    net, plain = unet(()), unet(())
    mover.attach({"unet": net})
    for step in range(2):
        assert torch.equal(run(net, step), run(plain, step))
    accelerate.cpu_offload(net, torch.device("cpu"))
    for step in range(PASSES):
        assert torch.equal(run(net, step), run(plain, step))
