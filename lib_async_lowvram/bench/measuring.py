"""Running passes of contenders: timing them, comparing every output, cutting one out for a picture.

Problem: a time means nothing when the output was wrong, and an output that would be right anyway proves nothing. So every
pass whose time counts, and every warm-up pass, is compared bit for bit with the reference contender's output for the same
input, and the references must be finite and differ from each other.

Called on the thread that runs the models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from time import perf_counter

import torch

from lib_async_lowvram.bench.contenders import Contender, Inputs
from lib_async_lowvram.bench.report import Timeline
from lib_async_lowvram.bench.shapes import CONTEXT_TOKENS, LATENT_CHANNELS, Shape, sd15_shape
from lib_async_lowvram.core.stats import Trace

BATCH = 2


def make_inputs(
    count: int, latent: int, seed: int, device: torch.device, dtype: torch.dtype, *, batch: int = BATCH, shape: Shape | None = None
) -> list[Inputs]:
    """`count` different inputs for a UNet of `shape` (SD1.5's unless given): latent pictures of `latent` x `latent`, timesteps,
    prompts, labels where it has them; each `batch` of them: two, as the WebUI runs the prompt and the negative prompt of one
    picture together."""
    shape = shape or sd15_shape()
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for index in range(count):
        picture = torch.randn(batch, LATENT_CHANNELS, latent, latent, generator=generator)
        context = torch.randn(batch, CONTEXT_TOKENS, shape.context, generator=generator)
        timesteps = torch.full((batch,), 999.0 * (count - index) / count)
        one = [picture.to(device, dtype), timesteps.to(device), context.to(device, dtype)]
        if shape.label:
            one.append(torch.randn(batch, shape.label, generator=generator).to(device, dtype))
        inputs.append(tuple(one))
    return inputs


@contextmanager
def one_compute_thread() -> Iterator[None]:
    """On the simulated device the other cores are the copy engines'."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit: unlike `torch.equal`, tells 0.0 from -0.0."""
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


class Passes:
    """Passes of several contenders over the same inputs, in turn.

    Attributes:
        seconds: name of contender -> of every measured pass. stalls: the same, of contenders that can tell.
        equal: whether every output so far was the reference's. compared: how many that were.
    """

    def __init__(self, inputs: Sequence[Inputs], tick: Callable[[], object]) -> None:
        """`tick` is called after every pass."""
        self._inputs = inputs
        self._tick = tick
        self._references: list[torch.Tensor] = []
        self._next = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.stalls: dict[str, list[float]] = defaultdict(list)
        self.equal = True
        self.compared = 0

    def take_references(self, contender: Contender) -> None:
        """Outputs of `contender` are what is right. Raises `RuntimeError` when they could not tell right from wrong."""
        for inputs in self._inputs:
            output = contender.run_pass(inputs)
            contender.finish()
            self._references.append(output.clone())
            self._tick()
        finite = all(bool(output.isfinite().all()) for output in self._references)
        if not finite or any(same_bits(output, self._references[0]) for output in self._references[1:]):
            raise RuntimeError("the model's outputs are not finite, or do not depend on its inputs: nothing to compare")

    def warm_up(self, contender: Contender, count: int) -> None:
        """`count` passes, compared but not timed."""
        for _ in range(count):
            self._one(contender)

    def measure(self, contender: Contender, count: int) -> None:
        """`count` passes, compared and timed."""
        for _ in range(count):
            stalled = contender.stall_seconds()
            self.seconds[contender.name].append(self._one(contender))
            if stalled is not None:
                self.stalls[contender.name].append(contender.stall_seconds() - stalled)

    def median(self, contender: Contender) -> float:
        """Seconds per measured pass."""
        return median(self.seconds[contender.name])

    def spread(self, contender: Contender) -> list[float]:
        """Least, lower quartile, upper quartile, most; seconds."""
        seconds = self.seconds[contender.name]
        if len(seconds) < 2:
            return seconds * 4
        low, _, high = quantiles(seconds, n=4, method="inclusive")
        return [min(seconds), low, high, max(seconds)]

    def trace(self, title: str, contender: Contender, count: int) -> Timeline:
        """Of `count` passes in a row, the one that took closest to the measured median. The first is left out if it can be:
        what its spans belong to may have begun before."""
        contender.trace = Trace()
        ends = [perf_counter()]
        for index in range(count):
            contender.run_pass(self._inputs[index % len(self._inputs)])
            contender.finish()
            ends.append(perf_counter())
            self._tick()
        spans, contender.trace = contender.trace.spans, None
        typical = self.median(contender)
        passes = list(zip(ends, ends[1:], strict=False))[min(1, count - 1) :]
        start, end = min(passes, key=lambda times: abs(times[1] - times[0] - typical))
        return Timeline.cut(title, spans, start, end)

    def _one(self, contender: Contender) -> float:
        which = self._next % len(self._inputs)
        self._next += 1
        contender.finish()
        start = perf_counter()
        output = contender.run_pass(self._inputs[which])
        contender.finish()
        seconds = perf_counter() - start
        self.equal &= same_bits(output, self._references[which])
        self.compared += 1
        self._tick()
        return seconds
