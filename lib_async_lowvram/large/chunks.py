"""A large batch through a UNet with one stream of weights: its parts are run in chunks of the batch, one chunk after the other.

Problem: all tiles should go through the UNet in one call, because a call streams the weights once; but what a block computes
meanwhile (attention, the wide layer of a feed-forward) for all tiles at once would not fit. So the batch stays whole *between*
parts of the UNet and is split *inside* them: a part is called for the first few samples, then for the next, and the results are put
side by side. Its weights are used several times in a row, and travel once.

Parts: the largest modules whose weights stay within a limit, so that all of them fit the mover's ring together while the chunks
run; a module that owns weights itself is never taken apart. Blocks with few weights (they have large pictures) are one part, blocks
with many weights (small pictures) several.

How: for the time of a call each part's `forward` is replaced on the instance, around whatever was there (Hypertile replaces it,
too), and put back after it. No class is touched, no module inserted; hooks stay where they are: a part's own fire once, those of
modules inside once per chunk. The number of chunks is told, and not their size: calls with groups of 13 and 12 samples fire the same
modules in the same order, which the mover follows.

Weights inside a part are used once per chunk, and whoever moves them must know that they are wanted again: `hold` is open around a
part's chunks (`AsyncModelMover.holding`). Without it each chunk's firings are further uses to the mover, in an order that it has
to learn, and its planner takes each for a copy.

Invariants: nothing is left behind, whatever is raised (BaseException included); a batch that is one chunk is the very same call.
Samples do not influence each other in these modules, so results are those of the whole batch, up to the last bits that a kernel
may round otherwise for another batch size.

Torch only. Called around one call of the UNet, on the thread that computes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.log import logger

OF_THE_LARGEST = 0.8
"""Weights of a part, where nobody says otherwise, in units of the largest leaf's: the mover's ring holds two of the largest unit at
least (I2), so a part takes at most two fifths of it, and the next one's copies have room. For SD1.5 and SDXL in half precision 47 MB;
the largest feed-forward has 39 MB."""


Hold = Callable[[nn.Module], AbstractContextManager]


def no_hold(part: nn.Module) -> AbstractContextManager:
    """Nobody moves the weights."""
    return nullcontext()


class CannotChunk(TypeError):
    """A part was given, or made, something else than samples; the message names it."""


def automatic_limit(root: nn.Module) -> int:
    """Bytes of weights in a part: see `OF_THE_LARGEST`."""
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters(recurse=False)) for module in root.modules()]
    return int(OF_THE_LARGEST * max(sizes, default=0))


def weight_bytes(module: nn.Module) -> int:
    """Of all parameters in it."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def parts(root: nn.Module, limit_bytes: int) -> list[nn.Module]:
    """The modules inside `root` to run in chunks, in order of registration: see the module's docstring. Modules without weights are
    parts only as long as they are within one."""
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()

    def look(module: nn.Module) -> None:
        for child in module.children():
            if child in seen:
                continue
            seen.add(child)
            size = weight_bytes(child)
            if not size:
                continue
            atom = any(parameter is not None for parameter in child._parameters.values())
            if _callable(child) and (atom or size <= limit_bytes):
                found.append(child)
            else:
                look(child)

    look(root)
    return found


def _callable(module: nn.Module) -> bool:
    """Whether it has a forward of its own: lists of modules have none."""
    return "forward" in module.__dict__ or getattr(type(module).forward, "__name__", "") != "_forward_unimplemented"


class _Chunks:
    """The forward of one part while it runs in chunks."""

    __slots__ = ("_hold", "_inner", "_number", "_part")

    def __init__(self, part: nn.Module, number: int, hold: Hold) -> None:
        self._part = weakref.ref(part)  # which holds this
        self._inner = part.forward
        self._number = number
        self._hold = hold

    def pass_through(self) -> None:
        """From now on every batch is one chunk."""
        self._number = 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = _batch(args, kwargs)
        number = min(self._number, batch)
        if number <= 1:
            return self._inner(*args, **kwargs)
        with self._hold(self._part()):
            return self._in_chunks(number, batch, args, kwargs)

    def _in_chunks(self, number: int, batch: int, args: tuple, kwargs: dict) -> torch.Tensor | None:
        whole: torch.Tensor | None = None
        for each in range(number):
            start, end = each * batch // number, (each + 1) * batch // number
            made = self._inner(*_rows(args, batch, start, end), **_rows(kwargs, batch, start, end))
            if not isinstance(made, torch.Tensor) or not made.dim() or made.shape[0] != end - start:
                raise CannotChunk(f"{_owner(self._inner)} made {_what(made)} of {end - start} samples: it cannot run in chunks")
            if whole is None:
                whole = _like(made, batch)
            whole[start:end] = made
        return whole


def _owner(inner: Any) -> str:
    return type(getattr(inner, "__self__", inner)).__name__


def _what(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _like(chunk: torch.Tensor, batch: int) -> torch.Tensor:
    """An empty tensor for the whole batch, laid out as the chunk is."""
    shape = (batch, *chunk.shape[1:])
    if chunk.dim() == 4 and chunk.is_contiguous(memory_format=torch.channels_last) and not chunk.is_contiguous():
        return torch.empty(shape, dtype=chunk.dtype, device=chunk.device, memory_format=torch.channels_last)
    return chunk.new_empty(shape)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _batch(args: tuple, kwargs: dict) -> int:
    """Samples in the first tensor; 0 where it has no room for any extent (time embeddings are small) or there is none."""
    first = next(_tensors((args, kwargs)), None)
    return first.shape[0] if first is not None and first.dim() >= 3 else 0


def _rows(value: Any, batch: int, start: int, end: int) -> Any:
    """The same arguments for samples start .. end; tensors for one sample, or for none, are for all."""
    if isinstance(value, torch.Tensor):
        if not value.dim() or value.shape[0] == 1:
            return value
        if value.shape[0] != batch:
            raise CannotChunk(f"an argument of shape {tuple(value.shape)} beside a batch of {batch} cannot run in chunks")
        return value[start:end]
    if isinstance(value, dict):
        return {key: _rows(each, batch, start, end) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(each, batch, start, end) for each in value)
    return value


@contextmanager
def in_chunks(root: nn.Module, number: int, limit_bytes: int | None = None, hold: Hold = no_hold) -> Iterator[None]:
    """Inside, the parts of `root` run in `number` chunks, as equal as may be (as many as there are samples where those are fewer).
    `limit_bytes`: weights of a part; None: `automatic_limit`. `hold`: open while a part's chunks run. ValueError for fewer than one
    chunk. A part that is given, or makes, something other than samples raises `CannotChunk`."""
    if number < 1:
        raise ValueError(f"{number} chunks")
    if number == 1:
        yield
        return
    if limit_bytes is None:
        limit_bytes = automatic_limit(root)
    placed: list[tuple[nn.Module, bool, Any, _Chunks]] = []
    try:
        for module in parts(root, limit_bytes):
            had = "forward" in module.__dict__
            before = module.forward
            ours = _Chunks(module, number, hold)
            placed.append((module, had, before, ours))
            module.forward = ours
        yield
    finally:
        for module, had, before, ours in reversed(placed):
            if module.__dict__.get("forward") is not ours:
                # Somebody has replaced it meanwhile, around ours: ours passes everything through from now on.
                ours.pass_through()
                logger.debug("%s: its forward was replaced while it ran in chunks", type(module).__name__)
            elif had:
                module.forward = before
            else:
                del module.__dict__["forward"]
