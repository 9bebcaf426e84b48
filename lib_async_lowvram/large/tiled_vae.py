"""Decoding and encoding pictures whose activations do not fit the device: the face of the tiled VAE.

Problem: the weights of an SD VAE are 160 MB, the activations of a 2048x2048 decode 12 GB. `run` computes what the decoder or encoder would
have computed, calling the very same modules, in one of these modes:

    whole       the network's own call. When it fits, or when one band would hold the whole picture. The same bits, of course.
    exact       bands of rows, each module called once for all of them (`banded`). The norms' statistics are the whole picture's, so
                nothing is approximated: what differs is the order of summation and the library's choice of algorithm for fewer rows.
                Activations that wait lie on the device while they fit, else on the host: spilled.
    recomputed  where host memory is too small for that: the steps that do not fit run in overlapping strips, once per norm for its
                statistics and once for the result (`estimated`). As exact, and slower.
    estimated   the same strips once, with statistics from a reduced picture; only where the limits ask for it. The error made is in
                the report.

Tiles are bands of the picture's whole width: two neighbours instead of eight, one contiguous copy each, rows fetched from neighbours
instead of computed twice. Even at a width of 8192 a row of the widest activation is 4 MB.

Batches are sliced: one picture at a time, unless the whole batch fits, or the limits ask for slices even so.

Callers: `webui/large_vae`, and whoever has such a network. One call at a time per network, gradients off, on the thread that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib_async_lowvram.large.banded import Banded, banded
from lib_async_lowvram.large.chunked_attention import attend
from lib_async_lowvram.large.disk_room import DiskRoom
from lib_async_lowvram.large.estimated import run_estimated
from lib_async_lowvram.large.rows import Untileable
from lib_async_lowvram.large.space import Space
from lib_async_lowvram.large.vae_layouts import kind_of, steps_of
from lib_async_lowvram.large.vae_memory import beyond_memory, shares, whole_bytes
from lib_async_lowvram.large.vae_steps import DECODER, Step

if TYPE_CHECKING:
    from lib_async_lowvram.device.host_memory import HostMemory

MODES = WHOLE, EXACT, RECOMPUTED, ESTIMATED = "whole", "exact", "recomputed", "estimated"


@dataclass(frozen=True)
class Limits:
    """What may be used.

    Attributes:
        device_bytes: for activations, on the device. host_bytes: for spilled ones. most_rows: of the picture (pixels), in one band;
            None: as memory allows. sliced: one picture of a batch at a time even where more fit. estimate: where even the host is too
            small, `ESTIMATED` instead of `RECOMPUTED`.
    """

    device_bytes: int
    host_bytes: int
    most_rows: int | None = None
    sliced: bool = False
    estimate: bool = False


@dataclass
class Report:
    """How it was done; over all pictures of a batch.

    Attributes:
        mode: one of `MODES`, of several pictures the last in that order. slices: calls it took.
        bands: computed, over all steps; rows: (fewest, most) in one.
        device_bytes: the most that bands and stored activations were counted to take together. host_bytes: of spilled activations at
            once; pinned_bytes: the most of it that was page-locked. spilled_bytes, restored_bytes: that travelled.
        in_strips: the steps that were `RECOMPUTED` or `ESTIMATED`. statistics_error: of the worst norm in them, see
            `norm_statistics.Statistics.error`; 0.0 where there are none.
    """

    mode: str = WHOLE
    slices: int = 0
    bands: int = 0
    rows: tuple[int, int] = (0, 0)
    device_bytes: int = 0
    host_bytes: int = 0
    pinned_bytes: int = 0
    spilled_bytes: int = 0
    restored_bytes: int = 0
    in_strips: tuple[str, ...] = ()
    statistics_error: float = 0.0

    def add(self, space: Space) -> None:
        """What one picture took."""
        self.bands += space.bands
        fewest = space.fewest_rows or 0
        self.rows = (min(self.rows[0] or fewest, fewest), max(self.rows[1], space.largest_rows))
        self.device_bytes = max(self.device_bytes, space.device_peak + space.band_peak)
        self.host_bytes = max(self.host_bytes, space.host_peak)
        self.pinned_bytes = max(self.pinned_bytes, space.pinned_peak)
        self.spilled_bytes += space.spilled
        self.restored_bytes += space.restored


def fits_whole(network: nn.Module, shape: Sequence[int], element: int, limits: Limits) -> bool:
    """Whether the network's own call may be made for an input of `shape`, of values of `element` bytes. `Untileable` for networks of
    another layout: then there is no other way to call them."""
    pictures, _, height, width = shape
    decodes = kind_of(network) == DECODER
    steps = steps_of(network)
    # The attention's own formula is not known; the plain one's matrices are counted.
    small = limits.most_rows is None or _picture_rows(steps, height, decodes) <= limits.most_rows
    return small and pictures * whole_bytes(steps, height, width, element) <= limits.device_bytes


def _picture_rows(steps: Sequence[Step], height: int, decodes: bool) -> int:
    return int(height * steps[-1].scale) if decodes else height


def run(
    network: nn.Module,
    x: torch.Tensor,
    limits: Limits,
    host: HostMemory | None = None,
    whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
    disk: DiskRoom | None = None,
    moved: Callable[[float], None] | None = None,
) -> tuple[torch.Tensor, Report]:
    """`network(x)` of a decoder (latents, after `post_quant_conv`) or encoder (pictures), and how it was done. `x`: (picture, channel,
    row, column) on the device.

    `host`: where spilled activations are allocated, pinned within its limit; None: ordinary memory. `whole`: what to call where bands are
    not needed; None: the network. `disk`: where spilled activations lie instead, `limits.host_bytes` of them.
    `moved`: is told the share of the multiplications that is done, 0 to 1, after each step in bands.
    `Untileable` for networks, operations or circumstances (gradients) that cannot be computed in bands: nothing has been changed then.
    `space.OutOfHostMemory`, torch's out-of-memory error: where even the smallest band does not fit."""
    if torch.is_grad_enabled():
        raise Untileable("gradients are on")
    report, whole = Report(), whole or network
    element = x.element_size()
    if not limits.sliced and fits_whole(network, x.shape, element, limits):
        report.slices = 1
        return whole(x), report
    results = []
    for number, picture in enumerate(x.split(1)):
        report.slices += 1
        progress = None if moved is None else (lambda share, done=number: moved((done + share) / len(x)))
        if fits_whole(network, picture.shape, element, limits):
            results.append(whole(picture))
        else:
            results.append(_in_bands(network, picture, limits, host, report, disk, progress))
    return torch.cat(results) if len(results) > 1 else results[0], report


def _costs(steps: Sequence[Step], height: int, width: int) -> list[float]:
    """Of each step, for progress only: multiplications, as far as convolutions of 3 x 3 and the attention's matrices make them."""
    found = []
    for step in steps:
        (into, out), pixels = step.channels, float(height * width * step.scale**2)
        found.append(9 * pixels * (out * (into + out) if step.reach == 2 else into * out))
        if step.attention is not None:
            found[-1] = pixels * into * (4 * into + 2 * pixels)
    return found


def _in_bands(
    network: nn.Module, x: torch.Tensor, limits: Limits, host: HostMemory | None, report: Report, disk: DiskRoom | None,
    moved: Callable[[float], None] | None,
) -> torch.Tensor:  # fmt: skip
    steps = steps_of(network)
    height, width = x.shape[2:]
    store_bytes, band_bytes = shares(limits.device_bytes)
    space = Space(x.device, store_bytes, band_bytes, limits.host_bytes, limits.most_rows, host, disk)
    short = beyond_memory(steps, height, width, x.element_size(), limits.device_bytes, limits.host_bytes)
    mode = EXACT if short is None else ESTIMATED if limits.estimate else RECOMPUTED
    report.mode = max(report.mode, mode, key=MODES.index)
    held = [banded(x, space)]  # and held by nobody else: a step's input must be gone when its result is stored
    costs = _costs(steps, height, width)
    number = 0
    while number < len(steps):
        if short is not None and number == short.start:
            some = [steps[each] for each in short]
            band_bytes = limits.device_bytes - space.device_now
            result, error = run_estimated(some, held.pop(), space, band_bytes, exact=not limits.estimate)
            held.append(result)
            del result
            report.in_strips = tuple(step.name for step in some)
            report.statistics_error = max(report.statistics_error, error)
            number = short.stop
        else:
            held.append(_step(steps[number], held, space))
            number += 1
        if moved is not None:
            moved(sum(costs[:number]) / sum(costs))
    result = held.pop().whole()
    report.add(space)
    return result


def _step(step: Step, held: list[Banded], space: Space) -> Banded:
    if step.attention is not None:
        return _attention(step, held.pop(), space)
    result = step.run(held.pop())
    result.store()  # now, while the step's own parts are what is held; and bands have one picture to read, not two
    return result


def _attention(step: Step, picture: Banded, space: Space) -> Banded:
    one = Step(step.name, step.run, step.channels, step.scale / step.scale, attention=step.attention)
    shape = picture.expression.shape
    element = picture.expression.dtype.itemsize
    if whole_bytes([one], *shape[2:], element) <= space.band_bytes:
        return banded(step.run(picture.whole()), space)
    result = attend(step.attention, picture, space)
    result.store()
    return result
