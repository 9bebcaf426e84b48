"""Stable Diffusion's UNets as numbers: for every leaf its parameters and what it computes, in execution order.

From the architectures' own figures (channels 320 x multipliers, transformer depths, context widths); the totals are checked
against the published parameter counts. Half precision, two images (conditional and unconditional) at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lib_async_lowvram.core.pipeline import Workload

WIDTH = 320
EMBEDDING = 4 * WIDTH
IMAGES = 2
TOKENS = 77
LEAST_SECONDS = 12e-6  # of any kernel
COPY_SECONDS = 8e-6
BETWEEN_PASSES = 4e-3


@dataclass(frozen=True)
class Architecture:
    multipliers: tuple[int, ...]
    depths: tuple[int, ...]  # transformer layers per resolution
    middle_depth: int
    context: int
    vector: int  # width of the pooled conditioning; 0 = none


SD15 = Architecture((1, 2, 4, 4), (1, 1, 1, 0), 1, 768, 0)
SDXL = Architecture((1, 2, 4), (0, 2, 10), 10, 2048, 2816)


@dataclass
class Tape:
    """What a UNet of this architecture runs, written down leaf by leaf."""

    architecture: Architecture
    tensors: list[tuple[int, ...]] = field(default_factory=list)  # numbers of elements of each leaf's parameters
    flops: list[list[float]] = field(default_factory=list)  # of each leaf, and of what runs between it and the next

    def leaf(self, flops: float, *elements: int) -> None:
        self.tensors.append(elements)
        self.flops.append([flops * IMAGES])

    def convolution(self, inner: int, outer: int, side: int, kernel: int = 3) -> None:
        weights = inner * outer * kernel * kernel
        self.leaf(2 * weights * side * side, weights, outer)

    def linear(self, inner: int, outer: int, rows: int, bias: bool = True) -> None:
        self.leaf(2 * inner * outer * rows, inner * outer, *([outer] if bias else []))

    def norm(self, channels: int, positions: int) -> None:
        self.leaf(8 * channels * positions, channels, channels)

    def attend(self, channels: int, positions: int, keys: int, context: int) -> None:
        self.norm(channels, positions)
        self.linear(channels, channels, positions, bias=False)
        for _ in ("keys", "values"):
            self.linear(context, channels, keys, bias=False)
        self.flops[-1].append(4 * positions * keys * channels * IMAGES)
        self.linear(channels, channels, positions)

    def transformer(self, channels: int, side: int, depth: int) -> None:
        positions = side * side
        self.norm(channels, positions)
        self.linear(channels, channels, positions)  # as a 1x1 convolution it has the same numbers
        for _ in range(depth):
            self.attend(channels, positions, positions, channels)
            self.attend(channels, positions, TOKENS, self.architecture.context)
            self.norm(channels, positions)
            self.linear(channels, 8 * channels, positions)
            self.linear(4 * channels, channels, positions)
        self.linear(channels, channels, positions)

    def residual(self, inner: int, outer: int, side: int) -> None:
        self.norm(inner, side * side)
        self.convolution(inner, outer, side)
        self.linear(EMBEDDING, outer, 1)
        self.norm(outer, side * side)
        self.convolution(outer, outer, side)
        if inner != outer:
            self.convolution(inner, outer, side, kernel=1)

    def run(self, pixels: int) -> Tape:
        architecture, side = self.architecture, pixels // 8
        levels = [(WIDTH * multiplier, depth) for multiplier, depth in zip(architecture.multipliers, architecture.depths, strict=True)]
        for inner in (WIDTH, architecture.vector):
            if inner:
                self.linear(inner, EMBEDDING, 1)
                self.linear(EMBEDDING, EMBEDDING, 1)
        self.convolution(4, WIDTH, side)
        channels, skips = WIDTH, [WIDTH]
        for number, (outer, depth) in enumerate(levels):
            for _ in range(2):
                self.residual(channels, outer, side)
                channels = outer
                if depth:
                    self.transformer(channels, side, depth)
                skips.append(channels)
            if number < len(levels) - 1:
                side //= 2
                self.convolution(channels, channels, side)
                skips.append(channels)
        self.residual(channels, channels, side)
        self.transformer(channels, side, architecture.middle_depth)
        self.residual(channels, channels, side)
        for number, (outer, depth) in reversed(list(enumerate(levels))):
            for place in range(3):
                self.residual(channels + skips.pop(), outer, side)
                channels = outer
                if depth:
                    self.transformer(channels, side, depth)
                if number and place == 2:
                    side *= 2
                    self.convolution(channels, channels, side)
        self.norm(channels, side * side)
        self.convolution(channels, 4, side)
        return self

    @property
    def parameters(self) -> int:
        return sum(sum(elements) for elements in self.tensors)

    def workload(self, flops_per_second: float) -> Workload:
        """On a link over which everything takes as long as the computing."""
        steps = [
            (unit, sum(max(LEAST_SECONDS, each / flops_per_second) for each in flops)) for unit, flops in enumerate(self.flops)
        ]
        nbytes = {unit: sum(-(-2 * count // 512) * 512 for count in elements) for unit, elements in enumerate(self.tensors)}
        seconds = BETWEEN_PASSES + sum(time for _, time in steps)
        return Workload(
            steps=tuple(steps),
            nbytes=nbytes,
            bandwidth=2 * self.parameters / seconds,
            copy_overhead_seconds=COPY_SECONDS,
            lead_seconds=BETWEEN_PASSES,
        )
