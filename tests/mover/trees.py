"""Random module trees with everything that makes moving weights hard, and the harness that runs one under the judges.

A tree is built from a seed and nothing else. Leaves store float16, bfloat16 or float32 and compute in float32 (CPU torch
lacks half kernels), some in channels_last; some own buffers, some are tied, fire twice, only in some passes, or never; a
`MultiheadAttention` reads its silent `out_proj` itself. Every value reaches the output, so a wrong byte anywhere shows.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.use_logger import UseLogger
from lib_async_lowvram.device.weight_file import WeightFile

WIDTH = 16


class Cast(nn.Module):
    """A linear leaf whose weights may be stored in any dtype; its input's shape is its output's."""

    def __init__(self, inner: int, dtype: torch.dtype, bias: bool) -> None:
        super().__init__()
        self.up = nn.Parameter((torch.randn(inner, WIDTH) / 4).to(dtype))
        self.down = nn.Parameter((torch.randn(WIDTH, inner) / 4).to(dtype))
        self.register_parameter("shift", nn.Parameter(torch.randn(WIDTH).to(dtype)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(torch.tanh(F.linear(x, self.up.float())), self.down.float())
        return y if self.shift is None else y + self.shift.float()


class Grid(nn.Module):
    """A convolution in channels_last over the last two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.reshape(-1, 4, 4, x.shape[-1] // 4).contiguous(memory_format=torch.channels_last)).reshape(x.shape)


class Scaled(nn.Module):
    """Owns a parameter and a buffer directly, and wraps another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.register_buffer("offset", torch.randn(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.gain) + self.offset


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    """Leaves run one after the other, residually; `script` says how often each fires in pass `now`."""

    def __init__(self, leaves: list[nn.Module], script: list[str]) -> None:
        super().__init__()
        self.leaves = nn.ModuleList(leaves)
        self.script = script
        self.now = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for leaf, how in zip(self.leaves, self.script, strict=True):
            times = {"once": 1, "twice": 2, "never": 0, "even": 1 - self.now % 2, "third": int(self.now % 3 == 2)}[how]
            for _ in range(times):
                x = x + torch.tanh(leaf(x))
        return x


class Net(nn.Module):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, now: int = 0, order: list[int] | None = None) -> torch.Tensor:
        for number in range(len(self.blocks)) if order is None else order:
            self.blocks[number].now = now
            x = self.blocks[number](x)
        return x


def build(seed: int) -> Net:
    """The tree of a seed."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def leaf() -> nn.Module:
        kind = chance.choice(["cast", "cast", "cast", "norm", "attend", "grid", "scaled", "linear"])
        if kind == "cast":
            return Cast(chance.choice([8, 24, 64, 200]), chance.choice(dtypes), chance.random() < 0.7)
        if kind == "norm":
            return nn.LayerNorm(WIDTH)
        if kind == "attend":
            return Attend()
        if kind == "grid":
            return Grid()
        if kind == "scaled":
            return Scaled(leaf())
        return nn.Linear(WIDTH, WIDTH)

    blocks = []
    for _ in range(chance.randint(1, 4)):
        leaves = [leaf() for _ in range(chance.randint(1, 5))]
        script = [chance.choice(["once"] * 6 + ["twice", "never", "even", "third"]) for _ in leaves]
        blocks.append(Block(leaves, script))
    net = Net(blocks)
    casts = [module for module in net.modules() if isinstance(module, Cast)]
    if len(casts) >= 2 and chance.random() < 0.5:
        first, second = chance.sample(casts, 2)
        if chance.random() < 0.5:
            second.up = first.up  # the same Parameter twice
            second.down = nn.Parameter((torch.randn(WIDTH, first.up.shape[0]) / 4).to(first.up.dtype))
        else:
            second.down = nn.Parameter(second.up.data.t())  # another view of the same bytes
    return net.eval()


def put_in_file(net: nn.Module, path: Path) -> WeightFile:
    """Write the weights, each at a place of its own kind, and point the parameters at the file. Those that share memory stay there."""
    parameters = {id(each): each for module in net.modules() for each in module._parameters.values() if each is not None}
    uses = Counter(parameter.untyped_storage().data_ptr() for parameter in parameters.values())
    own = [each for each in parameters.values() if uses[each.untyped_storage().data_ptr()] == 1 and each.is_contiguous()]
    data, offsets = bytearray(24), []
    for parameter in own:
        data += bytes(-len(data) % 8 + 8)
        offsets.append(len(data))
        data += bytes(parameter.detach().contiguous().view(torch.uint8).flatten().tolist())
    path.write_bytes(data)
    file = WeightFile(path)
    for parameter, offset in zip(own, offsets, strict=True):
        file.point(parameter, offset)
    return file


@dataclass
class Case:
    """One run: the tree of `seed` under the mover, beside its plain twin. `in_file`: its weights stay in a file, as far as they can."""

    seed: int
    share: float = 0.0  # of the weights, as budget; 0 = the least
    bandwidth: float = 1e9
    jitter: float = 0.0
    whole: bool = True
    small: int = 0
    passes: int = 5
    in_file: bool = False
    order: dict[int, list[int]] = field(default_factory=dict)

    def __enter__(self) -> Case:
        self.net = build(self.seed)
        self.twin = build(self.seed)  # not deepcopy: that unties parameters
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self.net.parameters())
        self.inner = SimulatedStreams(
            capacity_bytes=64 << 20, bandwidth=self.bandwidth, latency=1e-6, jitter_seconds=self.jitter, seed=self.seed, poison=True
        )
        self.streams = RecordingStreams(self.inner)
        config = OffloadConfig(budget_bytes=max(1, int(self.share * self.weight_bytes)), small_leaf_bytes=self.small, check_placement=True)
        self.mover = AsyncModelMover(config, self.streams)
        if self.in_file:
            self.folder = tempfile.TemporaryDirectory()
            self.mover.host.files.append(put_in_file(self.net, Path(self.folder.name) / "weights"))
        spec = self.net if self.whole else NetworkSpec([Region(block) for block in self.net.blocks], self.net, roots=[self.net])
        self.mover.attach({"net": spec})
        return self

    def run(self, now: int, order: list[int] | None = None) -> None:
        """One pass of both; equal bit for bit."""
        x = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1000 * self.seed + now))
        with torch.no_grad():
            expected = self.twin(x, now, order)
            with UseLogger(self.streams):
                got = self.net(x, now, order)
        assert torch.equal(got, expected), f"pass {now}: {int((got != expected).sum())} of {got.numel()} values differ"

    def check(self) -> dict:
        """The judges are content; the status, for more."""
        self.streams.check()
        status = self.mover.status()
        assert status["placement_faults"] == 0, status["last_error"]
        network = status["networks"]["net"]
        if network["passes"]:
            assert status["peak_weight_bytes"] <= network["budget_bytes"]
            assert status["host_waits"] == 0
        return status

    def __exit__(self, kind: object, *rest: object) -> None:
        self.mover.detach()
        if kind is None:
            self.streams.check()
            for name, parameter in self.net.named_parameters():
                assert torch.equal(parameter, dict(self.twin.named_parameters())[name]), name
            assert not any(module._forward_pre_hooks or module._forward_hooks for module in self.net.modules())
            assert self.inner.allocated_bytes == 0
        self.inner.close()
        if self.in_file:
            self.mover.host.files[0].close()
            self.folder.cleanup()
