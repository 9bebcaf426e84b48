"""A batch in chunks: the same results, nothing left behind, others' forwards kept, weights streamed once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.bench.unet import regions, sd15
from lib_async_lowvram.large.chunks import CannotChunk, automatic_limit, in_chunks, parts, weight_bytes
from tests.mover.chains import call, simulated


def inputs(batch: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 4, 8, 8), torch.arange(float(batch)), torch.randn(batch, 77, 768)


def forwards(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if "forward" in module.__dict__]


def test_parts_are_the_largest_within_the_limit() -> None:
    unet = sd15(32)
    everything = parts(unet, weight_bytes(unet))
    blocks = [unet.time_embed, *unet.input_blocks, unet.middle_block, *unet.output_blocks, unet.out]
    assert {id(part) for part in everything} == {id(block) for block in blocks}
    for limit in (0, automatic_limit(unet), 1 << 20):
        chosen = parts(unet, limit)
        inside = [module for part in chosen for module in part.modules()]
        assert len({id(module) for module in inside}) == len(inside), "one in the other"
        leaves = [module for module in unet.modules() if list(module.parameters(recurse=False))]
        assert {id(leaf) for leaf in leaves} <= {id(module) for module in inside}
        for part in chosen:
            assert weight_bytes(part) <= limit or list(part.parameters(recurse=False))
    assert not any(isinstance(part, nn.ModuleList) for limit in (0, 1 << 20, 1 << 30) for part in parts(nn.ModuleList([unet]), limit))


@pytest.mark.parametrize("number", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("limit", [0, 1 << 18, None, 1 << 30])
def test_the_same_results(number: int, limit: int | None) -> None:
    unet = sd15(32)
    given = inputs(7)
    with torch.no_grad():
        expected = unet(*given)
        with in_chunks(unet, number, limit):
            got = unet(*given)
    assert torch.equal(got, expected) if number == 1 else torch.allclose(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert not forwards(unet)


def test_chunks_are_as_equal_as_may_be() -> None:
    conv, seen = nn.Conv2d(3, 3, 1), []
    conv.register_forward_hook(lambda *_: seen.append("hook"))
    root = nn.Sequential(nn.Sequential(conv))
    before = conv.forward
    conv.forward = lambda x: seen.append(len(x)) or before(x)  # as Hypertile does
    mine = conv.forward
    with in_chunks(root, 3), torch.no_grad():
        root(torch.zeros(7, 3, 2, 2))
        root(torch.zeros(2, 3, 2, 2))
    assert [each for each in seen if each != "hook"] == [2, 2, 3, 1, 1]
    assert conv.forward is mine and forwards(root) == [conv]


def test_layouts_are_kept() -> None:
    conv = nn.Conv2d(4, 8, 1).to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 6, 6).to(memory_format=torch.channels_last)
    with in_chunks(nn.Sequential(conv), 4, 1 << 20), torch.no_grad():
        got = conv(x)
    assert got.stride() == conv(x).stride()


def test_nothing_is_left_behind_and_buried_ones_pass_through() -> None:
    class Interrupt(BaseException):
        pass

    unet = sd15(32)
    with pytest.raises(Interrupt), in_chunks(unet, 2, 1 << 20):
        raise Interrupt
    assert not forwards(unet)
    conv = unet.input_blocks[0]
    with in_chunks(unet, 2, 1 << 30):
        ours = conv.forward
        conv.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    assert forwards(unet) == [conv]
    given = inputs(3)
    with torch.no_grad():
        got = unet(*given)
        del conv.forward
        assert torch.equal(got, unet(*given))
    with pytest.raises(ValueError, match="0 chunks"), in_chunks(unet, 0):
        pass


def test_what_is_no_batch_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, other=None, pair=False):
            return (x, x) if pair else x

    root = nn.Sequential(Odd())
    x = torch.zeros(4, 2, 2)
    with in_chunks(root, 2, 0):
        assert root[0](x, other=torch.zeros(1, 5)).shape == x.shape
        with pytest.raises(CannotChunk, match=r"shape \(3, 2\) beside a batch of 4"):
            root[0](x, other=torch.zeros(3, 2))
        with pytest.raises(CannotChunk, match="Odd made tuple of 2 samples"):
            root[0](x, pair=True)


class Streamed:
    """A narrow SD1.5 UNet on the simulated device, of which a part may be resident."""

    def __init__(self, share: float) -> None:
        self.unet, self.twin = sd15(32), sd15(32)
        total = weight_bytes(self.unet)
        small = total * (1 << 20) // 1_719_041_928
        self.streams = simulated(capacity_bytes=4 * total)
        self.mover = AsyncModelMover(OffloadConfig(budget_bytes=max(1, int(total * share)), small_leaf_bytes=small), self.streams)
        self.mover.attach({"net": NetworkSpec([Region(block) for block in regions(self.unet)], self.unet, roots=[self.unet])})

    def run(self, given: tuple, number: int = 1, limit: int | None = None) -> tuple[torch.Tensor, int]:
        """The output, and the bytes that were streamed for it."""
        with in_chunks(self.unet, number, limit):
            got = call(lambda _: self.unet(*given), self.streams)
        return got, self.mover.status()["streamed_bytes_per_pass"]


def test_all_chunks_are_served_by_one_stream_of_weights(same_plan: None) -> None:
    """Under the least budget: nothing is resident, whatever was measured, and the ring holds two of the largest unit."""
    rig = Streamed(0.0)
    given, other = inputs(4), inputs(3)
    for _ in range(3):
        _, once = rig.run(given)
    assert once > 0
    for _ in range(2):
        _, learning = rig.run(given, 4)  # another order; the mover follows it from the third pass on
        assert learning > once
    for given_now, number in ((given, 4), (other, 3), (given, 4), (given, 4)):
        before = rig.mover.status()
        got, nbytes = rig.run(given_now, number) if number == 4 else rig.run(given, 4)
        after = rig.mover.status()
        assert nbytes == once
        assert after["misses"] == before["misses"] and after["refetches"] == before["refetches"]
    with torch.no_grad(), in_chunks(rig.twin, 4):
        assert torch.equal(got, rig.twin(*given))
    rig.mover.close()


def test_leaf_by_leaf_even_the_order_is_the_same() -> None:
    rig = Streamed(0.0)
    given = inputs(3)
    for _ in range(3):
        _, once = rig.run(given)
    before = rig.mover.status()
    assert [rig.run(given, number, 0)[1] for number in (3, 1, 2, 3)] == [once] * 4
    assert rig.mover.status()["misses"] == before["misses"]
    rig.mover.close()
