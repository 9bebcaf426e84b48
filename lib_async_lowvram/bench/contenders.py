"""What is compared: everything resident, stock's block moves, and the mover. One protocol for all.

Problem: a figure for the mover says something only beside what it replaces and what it cannot beat, measured the same way
on the same device in the same run.

- `resident` - all weights stay on the device: the compute time, and the reference output.
- `stock`    - WebUI's `--lowvram`: before each block, the one before goes back to the host and this one comes to the
               device, waiting for both.
- `async`    - `AsyncModelMover` under a budget.

Each contender has a model and a `Streams` of its own, so that none sees another's memory counter, and changes its model's
parameters from `setup` to `close`. Passes run on the calling thread; those of CUDA are launched and not awaited, use
`finish`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.bench.placed import Placed
from lib_async_lowvram.bench.unet import UNet, kept, regions
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.core.stats import Trace
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.network_spec import NetworkSpec, Region

Inputs = tuple[torch.Tensor, ...]
"""Latent, timesteps, context, and for SDXL the label: all on the device."""


@dataclass(frozen=True)
class Measured:
    """What a contender can tell after some passes, beside their time.

    Attributes:
        peak_weight_bytes: the peak of the device's own allocation counter since `reset`; None where the moves do not go
            through it.
        details: whatever else, for the summary.
    """

    peak_weight_bytes: int | None
    details: dict[str, Any]


class Contender(ABC):
    """`setup`, passes, `close`. Also a context manager that does the first and the last."""

    name: str

    def __init__(self, model: nn.Module, streams: Streams) -> None:
        self.model = model
        self.streams = streams
        self.trace: Trace | None = None

    @abstractmethod
    def setup(self) -> None:
        """Take over the model, which is on the host."""

    def run_pass(self, inputs: Inputs) -> torch.Tensor:
        """One pass. The output is the caller's."""
        with torch.no_grad():
            return self.call(inputs)

    def call(self, inputs: Inputs) -> torch.Tensor:
        return self.model(*inputs)

    def finish(self) -> None:
        """Block until everything launched so far is done."""
        self.streams.synchronize(self.streams.record(self.streams.current_stream()))

    def reset(self) -> None:
        """Measure from here on."""
        self.streams.reset_peak()

    def measured(self) -> Measured:
        """Since `reset`."""
        return Measured(self.streams.peak_allocated_bytes, {})

    def stall_seconds(self) -> float | None:
        """Seconds that computing has waited for copies since `setup`; None where the contender cannot tell."""
        return None

    def rest(self) -> None:
        """Others are next: give device memory back where the next pass can get it again. Nothing to give, unless overridden."""
        return

    def pinned_bytes(self) -> int | None:
        """Page-locked host bytes in use; None where nobody can tell."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Give the model back, on the host. Idempotent."""

    def __enter__(self) -> Contender:
        self.setup()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Resident(Contender):
    """All weights in one block of device memory."""

    name = "resident"

    def setup(self) -> None:
        self._all = Placed([self.model], self.streams)
        self._all.to_device()

    def run_pass(self, inputs: Inputs) -> torch.Tensor:
        if not self._all.on_device:
            self._all.to_device()
        return super().run_pass(inputs)

    def rest(self) -> None:
        self._all.to_host(copy=False)

    def close(self) -> None:
        self._all.to_host(copy=False)


class Stock(Contender):
    """Stock's `--lowvram`. On CUDA the moves are `module.to()`, as in the WebUI. On the simulated device they are the same
    copies, through its engines, into one block that is kept, as the caching allocator keeps what `.to()` freed."""

    name = "stock"

    def setup(self) -> None:
        self._real = self.streams.device.type != "cpu"
        self._hooks = []
        self._on_device: nn.Module | None = None
        self._computing_since: float | None = None
        self._names = {module: name for name, module in self.model.named_modules()}
        self._blocks = regions(self.model)
        self._placed = {} if self._real else {block: Placed([block], self.streams) for block in self._blocks}
        self._memory = None if self._real else self.streams.allocate(max(placed.nbytes for placed in self._placed.values()))
        self._kept = Placed(kept(self.model), self.streams)
        self._kept.to_device()
        for block in self._blocks:
            self._hooks.append(block.register_forward_pre_hook(self._before))

    def run_pass(self, inputs: Inputs) -> torch.Tensor:
        output = super().run_pass(inputs)
        if self.trace is not None:
            self.finish()
            self._computed(time.perf_counter())
        return output

    def measured(self) -> Measured:
        return Measured(None if self._real else self.streams.peak_allocated_bytes, {})

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._on_device is not None:
            self._to_host(self._on_device)
            self._on_device = None
        self._kept.to_host(copy=False)
        if self._memory is not None:
            memory, self._memory = self._memory, None
            self.streams.free(memory, (self.streams.record(self.streams.current_stream()),))

    def _before(self, block: nn.Module, args: object) -> None:
        if block is self._on_device:
            return
        start = time.perf_counter()
        self._computed(start)
        leaving = self._on_device
        if leaving is not None:
            self._to_host(leaving)
        back = time.perf_counter()
        self._to_device(block)
        self._on_device = block
        if self.trace is not None:
            there, name = time.perf_counter(), self._names[block]
            if leaving is not None:
                self.trace.add("write-back", self._names[leaving], start, back, weight_bytes(leaving))
            self.trace.add("copy", name, back, there, weight_bytes(block))
            self.trace.add("stall", name, start, there)
            self._computing_since = there

    def _computed(self, until: float) -> None:
        if self.trace is not None and self._computing_since is not None and self._on_device is not None:
            self.trace.add("compute", self._names[self._on_device], self._computing_since, until)
        self._computing_since = None

    def _to_device(self, block: nn.Module) -> None:
        if self._real:
            block.to(self.streams.device)
        else:
            self._placed[block].to_device(self._memory)

    def _to_host(self, block: nn.Module) -> None:
        if self._real:
            block.to("cpu")
        else:
            self._placed[block].to_host(copy=True)


class Async(Contender):
    """`AsyncModelMover` with WebUI's regions. `budget_bytes` bounds all weights on the device, `out` included."""

    name = "async"

    def __init__(self, model: UNet, streams: Streams, budget_bytes: int, *, small_leaf_bytes: int = OffloadConfig.small_leaf_bytes) -> None:
        super().__init__(model, streams)
        self.budget_bytes = budget_bytes
        self.small_leaf_bytes = small_leaf_bytes
        self.mover: AsyncModelMover | None = None

    def setup(self) -> None:
        self._kept = Placed(kept(self.model), self.streams)
        self._kept.to_device()
        self.mover = AsyncModelMover(self._config(), self.streams)
        spec = NetworkSpec([Region(module) for module in regions(self.model)], span=self.model)
        self.mover.attach({"unet": spec})
        self.reset()

    def run_pass(self, inputs: Inputs) -> torch.Tensor:
        self.mover.trace = self.trace
        if isinstance(self.streams, SimulatedStreams):
            # Its engines know best when a copy really ran.
            self.streams.on_copy = None if self.trace is None else partial(_add_copy, self.trace)
        return super().run_pass(inputs)

    def reset(self) -> None:
        super().reset()
        self._before = self._counts()

    def _config(self) -> OffloadConfig:
        # 0 would mean automatic; the mover raises what is too little to work with.
        return OffloadConfig(budget_bytes=max(1, self.budget_bytes - self._kept.nbytes), small_leaf_bytes=self.small_leaf_bytes)

    def rebudget(self, budget_bytes: int) -> None:
        """Another budget from the next pass on, which begins a new job."""
        self.budget_bytes = budget_bytes
        self.mover.configure(self._config())
        self.new_job()

    def effective_budget_bytes(self) -> int:
        """What the mover really works with, after a pass: a budget below the least that works was raised."""
        return self.mover.status()["networks"]["unet"]["budget_bytes"] + self._kept.nbytes

    def rest(self) -> None:
        self.new_job()

    def pinned_bytes(self) -> int:
        return self.mover.status()["pinned_bytes"]

    def new_job(self) -> None:
        """Leave the device, as the WebUI does between two pictures: the next pass plans with what the passes so far showed."""
        self.mover.drain()

    def measured(self) -> Measured:
        status = self.mover.status()
        counts = {name: value - self._before[name] for name, value in self._counts().items()}
        kept = ("state", "reason", "resident_bytes", "ring_bytes", "pinned_bytes", "bandwidth_bytes_per_s")
        kept += ("best_schedule_seconds", "streamed_bytes_per_pass")
        details = {key: status[key] for key in kept}
        return Measured(self.streams.peak_allocated_bytes, {**details, **counts})

    def close(self) -> None:
        if self.mover is not None:
            self.mover.detach()
            self.mover = None
            self._kept.to_host(copy=False)

    def stall_seconds(self) -> float:
        if self.streams.knows_stalls:
            return self.streams.stall_seconds
        return self.mover.status()["networks"]["unet"]["stall_seconds"]

    def _counts(self) -> dict[str, int]:
        names = ("passes", "hits", "misses", "refetches", "write_backs", "host_waits", "streamed_bytes")
        status = self.mover.status()
        return {**{name: status[name] for name in names}, "replanned": status["networks"]["unet"]["replanned"]}


def _add_copy(trace: Trace, engine: str, start: float, end: float, nbytes: int) -> None:
    """For `SimulatedStreams.on_copy`."""
    trace.add("copy" if engine == "onload" else "write-back", f"{nbytes / 1e6:.2f} MB", start, end, nbytes)


def largest_block_bytes(model: UNet) -> int:
    """Bytes of the largest block that stock moves: what stock needs on the device, beside `out`."""
    return max(map(weight_bytes, regions(model)))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
