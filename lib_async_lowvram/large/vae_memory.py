"""What an AutoencoderKL's activations take on the device and on the host, from its steps and the picture's size.

Problem: whether a picture is computed whole, in bands with everything on the device, in bands with spilled activations, or with estimated
statistics is decided before anything runs. Counted in tensors that live at once, in bytes, with e bytes per value, c and d the channels
before and after, p and q the pixels before and after a step:

    whole      residual block    e p max(4 c, c + 3 d): its input, the norm, the nonlinearity's factor and product; or its input and
                                 the same of the second half, whose norm has taken the first convolution's output's place
               down, up          e (2 c q' + d q), q' the larger picture's: what is convolved, a border or copy of it, the result
               other             e (2 c p + d q)
               attention         e p (6 c + 3 p): the input, norm, q, k, v, result, and with the plain formula three matrices
    in bands   residual block    e p max(c + 2 d, 3 d) stored: the input and both convolutions' outputs; or those and their sum
               other             e (c p + d q) stored

and `space.WORKSPACE` over what is whole, for convolutions' own memory. From the source of ldm/modules/diffusionmodules/model.py.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from lib_async_lowvram.large.space import WORKSPACE
from lib_async_lowvram.large.vae_steps import Step

MOST_BAND_BYTES = 256 << 20
"""A band need not be larger: its kernels take milliseconds by then, and everything else on the device spares copies."""


def _pixels(step: Step, height: int, width: int) -> tuple[int, int]:
    """Before and after the step. `height`, `width`: where the list of steps starts."""
    after = max(1, int(height * step.scale)) * max(1, int(width * step.scale))
    before = step.scale / step.factor
    return max(1, int(height * before)) * max(1, int(width * before)), after


def whole_bytes(steps: Sequence[Step], height: int, width: int, element: int, attention: bool = True) -> int:
    """The most that lives while the steps run on the whole picture, all as plain tensors. `attention`: False leaves those steps out."""
    most = 0
    for step in steps:
        (before, after), (into, out) = _pixels(step, height, width), step.channels
        if step.attention is not None:
            live = before * (6 * into + 3 * before) if attention else 0
        elif step.factor != 1:
            live = 2 * into * max(before, after) + out * after
        elif step.reach == 2:
            live = before * max(4 * into, into + 3 * out)
        else:
            live = 2 * into * before + out * after
        most = max(most, live)
    return int(WORKSPACE * element * most)


def stored_bytes(step: Step, height: int, width: int, element: int) -> int:
    """What is stored at once while one step is computed in bands."""
    (before, after), (into, out) = _pixels(step, height, width), step.channels
    if step.attention is not None:
        return element * before * 6 * into
    if step.reach == 2 and step.factor == 1:
        return element * before * max(into + 2 * out, 3 * out)
    return element * (into * before + out * after)


def shares(device_bytes: int) -> tuple[int, int]:
    """(for stored activations, for the band in work) of what the device has for activations."""
    band = min(device_bytes // 2, MOST_BAND_BYTES)
    return max(0, device_bytes - band), max(0, band)


def _sizes(step: Step, height: int, width: int, element: int) -> tuple[int, int]:
    """Of what goes into the step and of what comes out."""
    (before, after), (into, out) = _pixels(step, height, width), step.channels
    return element * into * before, element * out * after


def beyond_memory(steps: Sequence[Step], height: int, width: int, element: int, device_bytes: int, host_bytes: int) -> range | None:
    """The steps whose activations cannot all be kept, on the device and the host; None where all can. They are the list's end where it
    makes the picture larger (a decoder), else its beginning; and as many more as it takes until there is room for what goes into them and
    what comes out. What does not fit what is left on the device lies on the host whole, so as much as the largest activation may be lost
    between the two."""
    store, _ = shares(device_bytes)

    def fits(nbytes: int, largest: int) -> bool:
        return nbytes <= max(store, host_bytes, store + host_bytes - largest)

    sizes = [_sizes(step, height, width, element) for step in steps]
    short = [
        number
        for number, step in enumerate(steps)
        if not fits(stored_bytes(step, height, width, element), max(sizes[number]))
    ]
    if not short:
        return None
    if steps[-1].scale > 1:
        first, result = short[0], sizes[-1][1]
        while first > 0 and not fits(sizes[first][0] + result, max(sizes[first][0], result)):
            first -= 1
        return range(first, len(steps))
    last = short[-1]
    while last < len(steps) - 1 and not fits(sizes[last][1], 0):
        last += 1
    return range(last + 1)
