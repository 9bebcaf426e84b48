"""Every memory lever beside the mover, and every two of them: same bits as the same levers without it, streamed, within the budget.

On our SD1.5-shaped UNet, with torch alone; `test_diffusers_levers` has what diffusers brings. A CPU has no TF32: its switch is set, and the
bits stay the same. xformers' kernels and torch.compile's inductor are not run; to the mover they are one more attention function, and one
more backend of what the "eager" one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.bench import unet as unets
from lib_async_lowvram.claims import Refused
from lib_async_lowvram.device.simulated import SimulatedStreams

FLOAT8 = getattr(torch, "float8_e4m3fn", None)
BUDGET = 3 << 20
PASSES = 3

REPLACED = {"float8 layerwise", "inference mode"}
"""Weights that are cast under inference mode become inference tensors, which keep no version: nobody could tell when they change."""


@dataclass(frozen=True)
class Lever:
    """`kind`: of two of one kind only one can be used. `prepare`: the model before it is attached. `around`: each call. `why_not`: here."""

    name: str
    kind: str
    prepare: Callable[[nn.Module], object] = lambda net: None
    around: Callable[[], AbstractContextManager] = nullcontext
    why_not: str = ""


def layerwise_float8(net: nn.Module) -> None:
    """Weights of the large layers are kept as float8, and cast for each use, as diffusers' layerwise casting and the WebUI's fp8 do."""

    def up(module: nn.Module, args: tuple) -> None:
        module.to(torch.float32)

    def down(module: nn.Module, args: tuple, output: object) -> None:
        module.to(FLOAT8)

    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.to(FLOAT8)
            module.register_forward_pre_hook(up)
            module.register_forward_hook(down)


@contextmanager
def sliced_attention() -> Iterator[None]:
    """Attention one head at a time."""
    whole = unets.F.scaled_dot_product_attention

    def slices(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([whole(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in range(q.shape[1])], dim=1)

    unets.F.scaled_dot_product_attention = slices
    try:
        yield
    finally:
        unets.F.scaled_dot_product_attention = whole


@contextmanager
def math_attention() -> Iterator[None]:
    """Scaled dot product attention without its fused kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """The switch, which moves nothing; a CPU computes the same either way."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def half_works() -> bool:
    """torch 2.1 has no half precision convolution on the CPU."""
    with suppress(RuntimeError):
        nn.Conv2d(4, 4, 3).half()(torch.ones(1, 4, 8, 8, dtype=torch.float16))
        return True
    return False


HAS_SDPA_KERNEL = hasattr(torch.nn, "attention")
LEVERS = [
    Lever("float16", "precision", lambda net: net.half(), why_not="" if half_works() else "this torch's CPU has no half precision kernels"),
    Lever("bfloat16", "precision", lambda net: net.bfloat16()),
    Lever("autocast", "precision", around=lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    Lever("float8 layerwise", "precision", layerwise_float8, why_not="" if FLOAT8 else "this torch has no float8"),
    Lever("channels_last", "format", lambda net: net.to(memory_format=torch.channels_last)),
    Lever("attention slicing", "attention", around=sliced_attention),
    Lever("SDP without fused kernels", "attention", around=math_attention, why_not="" if HAS_SDPA_KERNEL else "this torch cannot choose"),
    Lever("TF32", "arithmetic", around=tf32),
    Lever("inference mode", "gradients", around=torch.inference_mode),
]
"""SDP attention, the default of our UNet, is in every one but those of kind "attention"."""


def made(levers: tuple[Lever, ...]) -> nn.Module:
    net = unets.sd15(16, seed=3).eval()
    for lever in levers:
        lever.prepare(net)
    return net


def called(net: nn.Module, levers: tuple[Lever, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    dtype = torch.float32 if dtype is FLOAT8 else dtype
    x = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    context = torch.randn(2, 7, 768, generator=generator).to(dtype)
    contexts = [torch.no_grad(), *(lever.around() for lever in levers)]
    with contexts[0], contexts[1] if len(contexts) > 1 else nullcontext(), contexts[2] if len(contexts) > 2 else nullcontext():
        return net(x, torch.tensor([500 - step, 500 - step]), context)


ALL = [(lever,) for lever in LEVERS] + [pair for pair in combinations(LEVERS, 2) if pair[0].kind != pair[1].kind]
STREAMED = [levers for levers in ALL if {lever.name for lever in levers} != REPLACED]


def compared(levers: tuple[Lever, ...]) -> dict:
    """The mover's status after passes that were equal, bit for bit."""
    plain, net = made(levers), made(levers)
    streams = SimulatedStreams(capacity_bytes=256 << 20, bandwidth=2e9, latency=1e-5, jitter_seconds=1e-4, seed=5)
    try:
        with AsyncModelMover(OffloadConfig(budget_bytes=BUDGET, small_leaf_bytes=0, check_placement=True), streams) as mover:
            mover.attach({"unet": net})
            for step in range(PASSES):
                expected, found = called(plain, levers, step), called(net, levers, step)
                assert expected.dtype == found.dtype and expected.isfinite().all()
                assert torch.equal(expected, found), f"pass {step}"
            assert not mover.demoted and streams.peak_allocated_bytes > 0
            return mover.status()
    finally:
        streams.close()


@pytest.mark.parametrize("levers", STREAMED, ids=lambda levers: " + ".join(lever.name for lever in levers))
def test_same_bits_streamed_within_the_budget(levers: tuple[Lever, ...]) -> None:
    for lever in levers:
        if lever.why_not:
            pytest.skip(lever.why_not)
    status = compared(levers)
    network = status["networks"]["unet"]
    assert status["state"] == "active" and status["placement_faults"] == 0, status["last_error"]
    assert network["streamed_bytes"] > 0 and network["passes"] == PASSES - 1
    assert status["peak_weight_bytes"] <= network["budget_bytes"] < network["weight_bytes"]


@pytest.mark.skipif(FLOAT8 is None, reason="this torch has no float8")
def test_weights_cast_under_inference_mode_stay_where_they_are() -> None:
    status = compared(tuple(lever for lever in LEVERS if lever.name in REPLACED))
    assert status["networks"]["unet"]["weight_bytes"] < BUDGET // 16  # what nobody casts; the same bits all the same


# -- what cannot be combined -------------------------------------------------------------------------------------------------
def traced() -> nn.Module:
    return torch.jit.trace(nn.Linear(4, 4), torch.ones(1, 4))


def compiled() -> nn.Module:
    return torch.compile(nn.Linear(4, 4), backend="eager")


@pytest.mark.parametrize(
    "made, said",
    [
        (traced, "is traced or scripted, and its layers do not say when they run: attach the module that it was made from"),
        (lambda: nn.Sequential(nn.Linear(4, 4), traced()), "is traced or scripted"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "is traced or scripted"),
        (compiled, "is compiled: attach the module that it was made from (`_orig_mod`), after compiling"),
        (lambda: nn.Linear(4, 4, device="meta"), "has no weights yet (meta device): load them first"),
    ],
    ids=["traced", "traced inside", "scripted", "compiled", "meta"],
)
def test_refused_with_what_to_do(made: Callable[[], nn.Module], said: str) -> None:
    streams = SimulatedStreams(capacity_bytes=1 << 20)
    try:
        with AsyncModelMover(OffloadConfig(), streams) as mover:
            net = made()
            with pytest.raises(Refused) as refused:
                mover.attach({"unet": net})
            assert said in str(refused.value)
            assert not mover.is_attached and not any(module._forward_pre_hooks for module in net.modules() if type(module) is nn.Linear)
    finally:
        streams.close()


def test_compiled_first_and_then_attached_it_streams() -> None:
    """As the refusal says: the module that the compiled one was made from. Compiled frames end at each hook."""
    plain, net = made(()), made(())
    compiled = torch.compile(net, backend="eager")
    streams = SimulatedStreams(capacity_bytes=256 << 20)
    try:
        with AsyncModelMover(OffloadConfig(budget_bytes=BUDGET, small_leaf_bytes=0), streams) as mover:
            mover.attach({"unet": compiled._orig_mod})
            for step in range(3):
                assert torch.equal(called(plain, (), step), called(compiled, (), step))
            status = mover.status()
            assert status["state"] == "active" and status["streamed_bytes"] > 0 and not mover.demoted
            assert status["peak_weight_bytes"] <= BUDGET
    finally:
        streams.close()
        torch._dynamo.reset()


def test_a_traced_copy_runs_beside_the_mover() -> None:
    """As the WebUI's `sd_unet` overrides: an engine of its own, made from the model, with weights of its own."""
    plain, net = made(()), made(())
    example = (torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 7, 768))
    with torch.no_grad():
        engine = torch.jit.trace(made(()), example, check_trace=False)
        expected = plain(*example)
    streams = SimulatedStreams(capacity_bytes=256 << 20)
    try:
        with AsyncModelMover(OffloadConfig(budget_bytes=BUDGET, small_leaf_bytes=0), streams) as mover:
            mover.attach({"unet": net})
            with torch.no_grad():
                for _ in range(3):
                    torch.testing.assert_close(engine(*example), expected)
                    assert torch.equal(net(*example), expected)
            assert mover.status()["state"] == "active"
    finally:
        streams.close()
