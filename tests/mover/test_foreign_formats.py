"""Others change what weights look like: their dtype, their strides, their storage - between passes, in the middle of a job,
inside a forward. Every pass is the twin's, and what is adopted is adopted once.

As the WebUI does it: fp8 storage beside cached fp16 weights, `manual_cast`, the VAE's fallback to another dtype,
channels_last, tiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.lora_double import LoraDouble, Network
from tests.mover.zoo import DEVICES, EVERYTHING, Rig, Zoo, ZooBlock, every_budget, every_device, rig

FLOAT8 = getattr(torch, "float8_e4m3fn", None)
CAST = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
PACKED = (nn.Linear, nn.Conv2d)


@pytest.fixture
def manual_cast() -> Iterator[None]:
    """Class-wide, as `devices.manual_cast`: every leaf is brought to the dtype that computes, and back behind its own forward.
    The module's parameters get new data twice, and their versions stay what they were."""
    originals = {kind: kind.forward for kind in CAST}

    def cast(original: Callable) -> Callable:
        def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
            before = module.weight.dtype
            if before != torch.float32:
                module.to(torch.float32)
            try:
                return original(module, x)
            finally:
                module.to(before)

        return forward

    for kind, original in originals.items():
        kind.forward = cast(original)
    yield
    for kind, original in originals.items():
        kind.forward = original


def to_dtype(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    """Storage of the leaves that `manual_cast` brings back to what computes."""

    def change(net: nn.Module) -> None:
        for module in net.modules():
            if isinstance(module, PACKED) and not type(module).__name__.startswith("NonDynamically"):
                module.to(dtype)

    return change


def to_fp8(net: nn.Module, cache: bool = True) -> None:
    """As `check_fp8`: storage becomes float8, fp16 copies stay beside as plain attributes."""
    for module in net.modules():
        if isinstance(module, PACKED) and not type(module).__name__.startswith("NonDynamically"):
            if cache:
                module.fp16_weight = module.weight.data.clone().half()
                module.fp16_bias = None if module.bias is None else module.bias.data.clone().half()
            module.to(FLOAT8)


needs_float8 = pytest.mark.skipif(FLOAT8 is None, reason="this torch has no float8")
DTYPES = [torch.float16, torch.bfloat16, pytest.param(FLOAT8, marks=needs_float8)]


@every_device
@every_budget
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_in_another_dtype_between_passes_and_back(manual_cast: None, device: str, budget: int, dtype: torch.dtype) -> None:
    with rig(device, budget) as made:
        made.both(to_dtype(dtype))
        made.passes(3)
        assert made.net.blocks[0].conv.weight.dtype == dtype
        before = made.mover.status()["adopted"]
        made.passes(2)
        # The cast leaves, once per use: their data is elsewhere each time, and nobody can see that it has not changed. A resident
        # is looked at once at the end.
        assert made.mover.status()["adopted"] - before == 2 * 14
        made.both(to_dtype(torch.float32))
        made.passes(2)
        assert made.counted(2)["adopted"] == 0


@needs_float8
@every_device
@every_budget
@pytest.mark.parametrize("cache", [True, False])
def test_lora_on_fp8_storage(manual_cast: None, device: str, budget: int, cache: bool) -> None:
    with LoraDouble() as lora, rig(device, budget) as made:
        lora.name_layers(made.net, made.twin)
        made.both(lambda net: to_fp8(net, cache))
        made.passes(2)
        for wanted in ([Network("one", layers=has_weights)], [Network("one", 0.5, layers=has_weights)], []):
            lora.want(*wanted)
            made.passes(2)
            made.same_weights()


def has_weights(name: str) -> bool:
    """Attention is not cast, and computes in float32."""
    return "attention" not in name


@every_device
@every_budget
def test_a_cast_around_every_forward_costs_no_copy_where_nothing_is_cast(manual_cast: None, device: str, budget: int) -> None:
    with rig(device, budget) as made:
        counts = made.counted(3)
        assert (counts["write_backs"], counts["adopted"], counts["refetches"]) == (0, 0, 0)


class Decoder(Zoo):
    """As the VAE: what it is given has its dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.out.weight.dtype)).float()


@every_device
@every_budget
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_fallback_to_another_dtype_between_two_passes(device: str, budget: int, dtype: torch.dtype) -> None:
    with rig(device, budget, Decoder) as made:
        made.both(lambda net: net.to(dtype))
        made.passes(3)
        assert made.net.out.weight.dtype == dtype
        assert made.counted(2)["adopted"] == 0  # once, and the masters have it now
        made.both(lambda net: net.to(torch.float32))
        made.passes(2)


@every_device
@every_budget
@pytest.mark.parametrize("where", ["enter", "blocks.1", "blocks.2.narrow"])
def test_a_fallback_in_the_middle_of_a_pass(device: str, budget: int, where: str) -> None:
    # All of the rest changes its dtype while one leaf runs: some units are in use, some resident, some on their way.
    class Follows(Zoo):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x.to(self.enter.weight.dtype)).reshape(-1, 4, 8)
            for block in self.blocks:
                x = block(x.to(block.norm.weight.dtype))
            return self.out(x.to(self.out.weight.dtype)).sum(1).float()

    with rig(device, budget, Follows) as made:
        for dtype in (torch.float64, torch.float32):
            handles = []
            for net in (made.net, made.twin):
                def hook(module: nn.Module, args: tuple, net: nn.Module = net, dtype: torch.dtype = dtype) -> tuple:
                    with made.unjudged():  # what is on the host is converted there
                        net.to(dtype)
                    return tuple(arg.to(dtype) for arg in args)

                handles.append(net.get_submodule(where).register_forward_pre_hook(hook))
            made.passes()
            for handle in handles:
                handle.remove()
            assert made.net.out.weight.dtype == dtype
            made.passes(2)
            made.same_weights()


@every_device
@every_budget
def test_channels_last(device: str, budget: int) -> None:
    with rig(device, budget) as made:
        made.both(lambda net: net.to(memory_format=torch.channels_last))
        assert made.net.blocks[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
        counts = made.counted()
        assert counts["adopted"] == 3
        assert made.counted(2)["adopted"] == 0
        assert made.net.blocks[0].conv.weight.is_contiguous(memory_format=torch.channels_last)


@every_device
@every_budget
def test_tiling_changes_the_padding_and_no_weight(device: str, budget: int) -> None:
    with rig(device, budget) as made:
        for mode in ("circular", "zeros"):
            for net in (made.net, made.twin):
                for module in net.modules():
                    if isinstance(module, nn.Conv2d):
                        module.padding_mode = mode
            counts = made.counted(2)
            assert (counts["write_backs"], counts["adopted"], counts["refetches"], counts["learning_passes"]) == (0, 0, 0, 0)


@every_device
@every_budget
def test_a_forward_replaced_on_the_instance(device: str, budget: int) -> None:
    # Hypertile, token merging: a module's own `forward` is replaced, and put back.
    with rig(device, budget) as made:
        for net in (made.net, made.twin):
            block = net.blocks[1]
            # The block called twice; and a leaf that gets half of its input.
            block.forward = lambda x, block=block: ZooBlock.forward(block, x) + ZooBlock.forward(block, x * 0.5)
            leaf = net.blocks[2].wide
            leaf.forward = lambda x, leaf=leaf: F.linear(x * 0.5, leaf.weight, leaf.bias)
        before = made.mover.status()["networks"]["net"]["passes"]
        made.passes(3)
        assert made.mover.status()["networks"]["net"]["passes"] == before + 3
        assert "forward" in vars(made.net.blocks[1]) and "forward" in vars(made.net.blocks[2].wide)  # nobody else's is put there
        for net in (made.net, made.twin):
            del net.blocks[1].forward, net.blocks[2].wide.forward
        made.passes(2)


@pytest.mark.parametrize("device", ["recorded"])
def test_meta_parameters_put_in_place_between_passes(device: str) -> None:
    # Somebody empties a part that does not run; nobody moves it, and the rest goes on.
    class Skips(Zoo):
        skip = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x).reshape(-1, 4, 8)
            for number, block in enumerate(self.blocks):
                if not (self.skip and number == 1):
                    x = block(x)
            return self.out(x).sum(1)

    for budget in (1, EVERYTHING):
        made = Rig(DEVICES[device](), budget, Skips)
        for net in (made.net, made.twin):
            net.skip = True
            net.blocks[1].to("meta")
        made.passes(3)
        made.worked(budget)
        assert all(parameter.device.type == "meta" for parameter in made.net.blocks[1].parameters())
        made.mover.detach()
        assert made.streams.allocated_bytes == 0
