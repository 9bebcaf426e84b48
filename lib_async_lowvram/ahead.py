"""Fetching ahead: the first weights of the next network travel while the one in use still computes.

Problem: a picture takes a text encoder, a UNet and a VAE in turn, and each begins with an empty device and a link that was idle until
then. A host often knows which comes next. So, when it says so (`AsyncModelMover.expect`), copies of that network's residents are
enqueued as the pass in use ends - behind all of that network's own copies, so that none of those is delayed, and while the device
computes what the host has launched - as far as the budget has room beside what the network in use holds.

Memory for them is taken as the pass begins: a device's allocator makes whoever copies there wait for what was computing when it was
taken (CUDA: blocks come from the stream that computes), and at the pass's end that would be the pass.

What arrives is kept by the other network (`kept`), unpublished, until that is entered. It is given up - memory freed behind its copy,
nothing else changed - when anybody else takes the device, wants it, or needs the room; masters that were changed meanwhile are seen
when the copy would be adopted, and fetched again.

Invariants: I2 - with what is fetched the device holds no more than the budget of the network in use. I3 - nothing here waits on the
host, except where nothing may be in flight any more (`drop`). Fetching never raises into the host: a device without room for it just
has nothing fetched, and an error of ours is noted as the other network's fault, which the mover heeds.

Called by the mover and its networks under the mover's lock, on whatever thread ends a pass or wants the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from lib_async_lowvram.device.streams import align
from lib_async_lowvram.device.weights import Change, Unit
from lib_async_lowvram.log import logger
from lib_async_lowvram.rescue import in_one_line, is_ours
from lib_async_lowvram.residents import in_firing_order
from lib_async_lowvram.transfers import Transfers

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network

LESS = 16
"""Parts of the bytes held by which the budget must have shrunk below them before what was fetched is given up: the automatic one
follows what is free, which comes and goes (as in `planning`)."""


class Ahead:
    """See the module. One for all networks of a mover."""

    def __init__(self) -> None:
        self._wanted: Network | None = None  # to be fetched as the next pass ends
        self._for: Network | None = None  # holds what was fetched, and what is reserved
        self._reserved: dict[Unit, torch.Tensor] = {}

    def concerns(self, network: Network | None) -> bool:
        """Whether anything is fetched, or will be, for it."""
        return network is not None and network in (self._wanted, self._for)

    # -- fetching ------------------------------------------------------------------------------------------------------
    def expect(self, network: Network) -> None:
        """Fetch it as the pass that is open now ends, or else the next one: once."""
        self._wanted = network

    def pass_begun(self, current: Network) -> None:
        """A streamed pass of `current` begins: take memory for what is expected after it."""
        wanted = self._wanted
        if wanted is not None:
            with self._noted(wanted):
                self._reserve(wanted, current)

    def pass_ended(self, current: Network | None, complete: bool) -> None:
        """A pass of `current` is over, its last copies are enqueued. `complete`: not cut short, nor about to be left."""
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            return
        if not complete or current is None or not _may_come_after(wanted, current):
            self._free_reserved()
            return
        with self._noted(wanted):
            self._reserve(wanted, current)  # where the pass had begun before anybody expected something
            self._fetch(wanted)
            self._free_reserved()

    @contextlib.contextmanager
    def _noted(self, network: Network) -> Iterator[None]:
        """An error in it gives up what there is, and goes no further unless it is an interrupt."""
        try:
            with network.judged(False):
                yield
        except BaseException as error:
            self.give_up()
            if is_ours(error):
                logger.error("%s: a fault of this extension while it was fetched ahead", network.name, exc_info=error)
                network.fault = network.fault or f"{network.name}: a fault of this extension ({type(error).__name__}), see the log"
            elif isinstance(error, Exception):
                logger.warning("%s: not fetched ahead: %s", network.name, in_one_line(error))
            else:
                raise

    def _reserve(self, network: Network, current: Network) -> None:
        """Take memory for as many residents as fit beside what the device holds, in the order in which they fire."""
        if not _may_come_after(network, current):
            return
        if self._for is not network:
            self.give_up()
        streams = network.context.streams
        room = network.context.budget(current.planning.key) - streams.allocated_bytes
        staged = network.context.pinning.can_stage(network.contents.units)
        self._for = network
        for unit in in_firing_order(network):
            nbytes = align(unit.nbytes)
            if not nbytes or nbytes > room or unit in network.kept or unit in self._reserved or not _can_travel(unit, network, staged):
                continue
            try:
                self._reserved[unit] = streams.allocate(unit.nbytes)
            except torch.cuda.OutOfMemoryError:
                return  # somebody else has the memory that the budget counts on
            room -= nbytes

    def _fetch(self, network: Network) -> None:
        """Enqueue the copies into what was reserved."""
        transfers = Transfers(network.context, network.counters)
        staged = network.context.pinning.can_stage(network.contents.units)
        for unit in list(self._reserved):
            if not _can_travel(unit, network, staged) or self._reserved[unit].numel() < unit.nbytes:
                continue  # changed since the pass began
            network.contents.true_up(unit)
            transfers.fetch(unit, self._reserved[unit])
            network.kept.put(unit, self._reserved.pop(unit), unit.copied, arriving=True)
            network.counters.fetched_ahead_bytes += unit.nbytes

    def _free_reserved(self) -> int:
        """Nobody has used it. Bytes."""
        freed = 0
        while self._reserved:
            unit, memory = self._reserved.popitem()
            freed += align(memory.numel())
            self._for.context.streams.free(memory)
        return freed

    # -- giving up -----------------------------------------------------------------------------------------------------
    def hand_over(self, network: Network) -> None:
        """`network` takes the device now: what was fetched for it stays, for anybody else it is given up."""
        if self._for is network:
            self._free_reserved()
            self._for = None
        else:
            self.give_up()

    def heed_budget(self, current: Network) -> None:
        """A pass of `current` begins: it may allow less now (a larger picture, another program)."""
        if self._for is not None:
            held = current.context.streams.allocated_bytes
            if current.context.budget(current.planning.key) < held - held // LESS:
                self.give_up()

    def give_up(self) -> int:
        """Free everything that was fetched or reserved, behind the copies under way. Bytes."""
        network = self._for
        if network is None:
            return 0
        freed = self._free_reserved() + network.kept.reduce_to(())
        self._for = None
        return freed

    def drop(self) -> int:
        """The same, expect nothing any more, and wait on the host until none of those copies is under way: their masters may be let
        go of next. Bytes."""
        self._wanted = None
        network, freed = self._for, self.give_up()
        if network is not None:
            try:
                network.kept.settle()
            except Exception as error:  # of a copy that nobody wants any more
                logger.warning("%s: a copy that was fetched ahead, and given up: %s", network.name, in_one_line(error))
        return freed


def _may_come_after(network: Network, current: Network) -> bool:
    """Whether what `network` would onload first is known, and may be copied now, while `current` streams. (No network does at the end of
    a pass with gradients, or with `always_write_back`.)"""
    planning, contents = network.planning, network.contents
    return (
        network is not current
        and current.streaming is not None
        and current.planning.most_bytes is None  # it has less than its plan wanted: memory is short
        and not (network.detached or network.fault or network.in_pass)
        and planning.learned is not None
        and planning.plan is not None
        and not (planning.stale or contents.resized)
        and not contents.changed
    )


def _can_travel(unit: Unit, network: Network, staged: bool) -> bool:
    """Whether its copy can be enqueued without a wait on the host, and without packing anything. `staged`: the staging ring can
    carry it."""
    change = unit.host_change()
    if change is Change.LAYOUT:
        return False
    if unit.in_file is not None:
        return staged and change is Change.NONE and not unit.dirty
    return staged or network.context.host.is_pinned(unit.master)
