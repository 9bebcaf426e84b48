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

    What is measured goes under a key: the contender's name, unless another one is given.

    Attributes:
        seconds: key -> of every measured pass. launched: the same, until the pass had been launched. stalls: the same, of
            contenders that can tell. references: the right outputs. wrong: keys with an output that was not
            the reference's. compared: how many outputs were.
    """

    def __init__(self, inputs: Sequence[Inputs], tick: Callable[[], object]) -> None:
        """`tick` is called after every pass."""
        self._inputs = inputs
        self._tick = tick
        self.references: list[torch.Tensor] = []
        self._next = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.launched: dict[str, list[float]] = defaultdict(list)
        self.stalls: dict[str, list[float]] = defaultdict(list)
        self.wrong: set[str] = set()
        self.compared = 0

    @property
    def equal(self) -> bool:
        """Whether every output so far was the reference's."""
        return not self.wrong

    def take_references(self, contender: Contender) -> None:
        """Outputs of `contender` are what is right. Raises `RuntimeError` when they could not tell right from wrong."""
        for inputs in self._inputs:
            output = contender.run_pass(inputs)
            contender.finish()
            self.references.append(output.clone())
            self._tick()
        finite = all(bool(output.isfinite().all()) for output in self.references)
        if not finite or any(same_bits(output, self.references[0]) for output in self.references[1:]):
            raise RuntimeError("the model's outputs are not finite, or do not depend on its inputs: nothing to compare")

    def warm_up(self, contender: Contender, count: int, key: str = "") -> float:
        """`count` passes, compared but not timed. Returns the seconds of the last one, for estimates."""
        return self._train(contender, count, key or contender.name, timed=False)

    def measure(self, contender: Contender, count: int, key: str = "") -> None:
        """`count` passes, compared and timed."""
        self._train(contender, count, key or contender.name, timed=True)

    def median(self, contender: Contender | str) -> float:
        """Seconds per measured pass."""
        return median(self.seconds[_key(contender)])

    def spread(self, contender: Contender | str) -> list[float]:
        """Least, lower quartile, upper quartile, most; seconds."""
        seconds = self.seconds[_key(contender)]
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

    def _train(self, contender: Contender, count: int, key: str, timed: bool) -> float:
        """`count` passes that follow each other at once: in a pause the mover's lookahead would get ahead for nothing. Outputs are
        compared after the last."""
        outputs = []
        contender.finish()
        # Asking takes time, so only around the whole: every pass gets its share.
        stalled = contender.stall_seconds() if timed else None
        before = perf_counter()
        seconds = 0.0
        for _ in range(count):
            which = self._next % len(self._inputs)
            self._next += 1
            outputs.append((which, contender.run_pass(self._inputs[which])))
            launched = perf_counter() - before
            contender.finish()
            now = perf_counter()
            seconds, before = now - before, now
            if timed:
                self.seconds[key].append(seconds)
                self.launched[key].append(launched)
        if stalled is not None:
            self.stalls[key] += [(contender.stall_seconds() - stalled) / count] * count
        for which, output in outputs:
            if not same_bits(output, self.references[which]):
                self.wrong.add(key)
            self.compared += 1
            self._tick()
        return seconds


def _key(contender: Contender | str) -> str:
    return contender if isinstance(contender, str) else contender.name
