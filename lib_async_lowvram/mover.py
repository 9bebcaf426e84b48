"""`AsyncModelMover`: the face of the library - attach networks, run them, read the status.

Problem: a host has several networks that never run at once and one device they all must fit on. The mover holds them
together: at most one network is *in use* (has device memory); when another one starts a pass, it is left first.

    mover = AsyncModelMover(OffloadConfig(budget_bytes=600 << 20), "cuda:0")
    mover.attach({"unet": unet, "text": text_encoder})
    ...                       # call the modules as ever, with gradients off
    mover.detach()

Threads: any method may be called from any thread. Passes run on the caller's thread, one at a time over all networks: who wants
to start one while another thread is in the middle of one waits for its end. What another thread asks for in the middle of a pass
(`drain`, `detach`, `configure`) is done when that pass ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lib_async_lowvram.backups import Backups
from lib_async_lowvram.claims import refuse_unmanageable
from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.context import Context
from lib_async_lowvram.device.address_ranges import HostRanges
from lib_async_lowvram.device.choose import open_streams
from lib_async_lowvram.device.heap import trim_heap
from lib_async_lowvram.device.host_memory import Borrower, HostMemory
from lib_async_lowvram.device.placement import PlacementChecker
from lib_async_lowvram.device.streams import Streams
from lib_async_lowvram.log import logger
from lib_async_lowvram.looking import Looking
from lib_async_lowvram.network import Network
from lib_async_lowvram.network_spec import NetworkSpec
from lib_async_lowvram.shadow import masters_of
from lib_async_lowvram.shedding import shed
from lib_async_lowvram.turns import Turns


class AsyncModelMover(Looking):
    """Moves the weights of attached networks to the device while it computes.

    Attributes:
        streams: the device. config: what applies from the next pass on.
        on_demote: called with the reason after `demote` has put everything back.
        on_network_change: called with the name of the network that takes the device, or None when it is left.
        backups: for who patches weights in place and undoes it later.
        demoted: the reason, once `demote` was called; "" before. last_error: the newest error, one line.
    """

    def __init__(
        self, config: OffloadConfig | None = None, device: str | torch.device | Streams | None = None, host: HostMemory | None = None
    ) -> None:
        """`device`: "cuda:1", "simulated", a `torch.device`, a `Streams` (which stays the caller's to close), or None for
        the best at hand. `host`: another mover's, whose masters are shared with it (`shadow`). Raises `UnsupportedDevice` with
        one line saying why for a device nobody can drive."""
        self.config = config or OffloadConfig()
        self._owns_streams = not isinstance(device, Streams)
        self.streams: Streams = open_streams(device) if self._owns_streams else device
        checker = ranges = None
        if self.config.check_placement:
            ranges = HostRanges()
            checker = PlacementChecker(ranges.overlaps, counting=True)
        self.host = host or HostMemory(self.streams, self.config.pinned_limit_bytes)
        self._context = Context(self.streams, self.host, self.config, checker, ranges, shares_masters=host is not None)
        if host is not None:
            self._borrower = Borrower(self._context.lock, self.streams)
            host.borrowers.add(self._borrower)
        self._networks: dict[str, Network] = {}
        self._current: Network | None = None
        self.backups = Backups(self._context, lambda: self._current)
        self._turns = Turns(self._context.turn, lambda: self._current)
        self.on_demote: Callable[[str], None] | None = None
        self.on_network_change: Callable[[str | None], None] | None = None
        self.demoted = ""
        self.last_error = ""

    # -- attaching -----------------------------------------------------------------------------------------------------
    def attach(self, networks: Mapping[str, nn.Module | NetworkSpec]) -> AsyncModelMover:
        """Pack, pin and hook the given networks; their parameters become views of host masters. Returns the mover.

        A plain module is one network, and one call of it one pass. Its learning pass holds all of it on the device when
        that fits, else one child at a time. Raises `ValueError` for a name in use or a module another mover manages.
        """
        with self._context.lock:
            self._forget_dead()
            for name, network in networks.items():
                if name in self._networks:
                    raise ValueError(f"a network named {name!r} is attached already")
                spec = network if isinstance(network, NetworkSpec) else self._spec_of(network)
                refuse_unmanageable(spec)
                self._networks[name] = Network(name, spec, self._context, self)
            trim_heap()  # where the weights were before they were packed
        return self

    def _spec_of(self, module: nn.Module) -> NetworkSpec:
        tensors = [*module.parameters(), *module.buffers()]
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        # All of it at once is right for every module; only a model that would not leave half of the device is split.
        return NetworkSpec.of(module, whole=2 * nbytes <= self.streams.free_memory())

    def detach(self, names: Iterable[str] | None = None) -> None:
        """Leave, take every hook off, unpin. Parameters stay ordinary host tensors. All networks unless named."""

        def now() -> None:
            for name in list(self._networks) if names is None else list(names):
                network = self._networks.pop(name, None)
                if network is not None:
                    self._leave_if_concerned(network)
                    network.detach()

        self._between_passes(now)

    def _leave_if_concerned(self, network: Network) -> None:
        if network is self._current:
            self._leave()
        elif self._context.ahead.concerns(network):
            self._context.ahead.drop()

    @property
    def is_attached(self) -> bool:
        return bool(self._networks)

    def forget_dead(self) -> list[str]:
        """Drop networks whose modules are gone or were moved to the meta device; their names. Every pass's start does it."""
        with self._context.lock:
            return self._forget_dead()

    def _forget_dead(self) -> list[str]:
        dead = [name for name, network in self._networks.items() if not network.contents.alive]
        for name in dead:
            network = self._networks.pop(name)
            self._leave_if_concerned(network)
            network.detach()
        return dead

    def __enter__(self) -> AsyncModelMover:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach everything, and close the streams if the mover opened them."""

        def now() -> None:
            self.detach()
            if self._context.shares_masters:
                self.host.borrowers.discard(self._borrower)
            if self._owns_streams:
                self.streams.close()

        self._between_passes(now)

    # -- passes --------------------------------------------------------------------------------------------------------
    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """One pass of a network whose spec has no span. Nested use is part of the same pass."""
        network = self._networks[name]
        with self._context.lock:
            nested = network.in_pass and network.thread == threading.get_ident() and network.opened_by_caller
            if not nested:
                network.begin_pass(announced=True)
                network.opened_by_caller = True
        complete = False
        try:
            yield
            complete = True
        finally:
            if not nested:
                with self._context.lock:
                    network.opened_by_caller = False
                    network.end_pass(complete)

    def prepare(self, name: str) -> None:
        """Start the first onloads of a network now, without waiting for them. Nothing before it has learned."""
        with self._context.lock:
            network = self._networks.get(name)
            if network is not None and not (self._current is not None and self._current.busy):
                with network.guarded():
                    network.prepare()
                self._heed()

    def expect(self, name: str) -> None:
        """The network of that name comes next, as far as the caller knows: as the pass that is open ends, or else the next one that any
        network runs, its residents are fetched as far as the budget has room for them (see `ahead`). Nothing where it is in use
        already, has not learned, or is unknown."""
        with self._context.lock:
            network = self._networks.get(name)
            if network is not None and network is not self._current:
                self._context.ahead.expect(network)

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """The caller runs `module`, a part of the network in use, several times in a row: weights used inside stay on the device until
        the end, and travel once, as far as the ring has room for all of them. Nothing outside a streamed pass of this thread, or
        inside another hold."""
        with self._context.lock:
            network = self._current
            mine = network is not None and network.in_pass and network.thread == threading.get_ident()
            held = network.calls.hold() if mine else None
        try:
            yield
        finally:
            if held is not None:
                with self._context.lock:
                    network.calls.let_go(held, module)

    def wait_for_turn(self) -> None:
        """See `Turns.wait`."""
        self._turns.wait()

    def take_over(self, network: Network) -> bool:
        """See `network.Passes`."""
        self._turns.catch_up()
        self._forget_dead()
        if network.detached:
            return False
        if self._context.config is not self.config:
            self._apply_config()
        if self._current is not network:
            self._context.ahead.hand_over(network)
            if self._current is not None:
                self._current.leave()
            self._current = network
            self._context.peaks.network(network.name)
            if self.on_network_change is not None:
                self.on_network_change(network.name)
        return True

    def _apply_config(self) -> None:
        """Between two passes: the new configuration counts from here on."""
        before, self._context.config = self._context.config, self.config
        self._context.ahead.drop()
        for network in self._networks.values():
            network.planning.stale = True
        if self.config.pinned_limit_bytes != before.pinned_limit_bytes:
            if self._current is not None:
                self._current.leave()  # nothing may be in flight while memory is unpinned
            self._context.pinning.change_limit(self.config.pinned_limit_bytes)

    def ended(self, complete: bool) -> None:
        """See `network.Passes`."""
        self._turns.ended()
        self._heed()
        self._context.ahead.pass_ended(self._current, complete)

    def _heed(self) -> None:
        """No pass is open: give way to stock where a network turned out to be slower, or wrong."""
        reason = next((found for network in self._networks.values() if (found := network.fault or network.planning.verdict)), "")
        if reason:
            self.demote(reason)

    def _between_passes(self, action: Callable[[], None]) -> None:
        with self._context.lock:
            self._turns.between_passes(action)

    # -- between passes ------------------------------------------------------------------------------------------------
    def drain(self, for_network: str | None = None) -> None:
        """Leave the network in use: masters true, nothing in flight, device memory given back. `for_network`: is the one that runs next;
        what was fetched for it stays, and may be under way still."""

        def now() -> None:
            self._leave(for_network)
            self._heed()

        self._between_passes(now)

    def _leave(self, for_network: str | None = None) -> None:
        ahead = self._context.ahead
        if for_network is None or not ahead.concerns(self._networks.get(for_network)):
            ahead.drop()
        if self._current is not None:
            network, self._current = self._current, None
            network.leave()
            self._context.peaks.network(None)
            if self.on_network_change is not None:
                self.on_network_change(None)

    def shed(self, name: str) -> int:
        """Device memory ran out in a pass of `name` on the calling thread, which is over: see `shedding.shed`. Bytes."""
        with self._context.lock:
            network = self._networks.get(name)
            mine = network is not None and network is self._current and not (network.thread != threading.get_ident() and network.busy)
            return shed(network) if mine else 0

    def configure(self, config: OffloadConfig) -> None:
        """Use another configuration from the next pass on."""
        if config != self.config:
            self.config = config

    def take_up(self) -> None:
        """What was changed on the host counts now, and not when it is next used: other tensors are packed, memory nobody points at any
        more is given back. Nothing for the network in use."""
        self.masters(self._networks)

    def mark_dirty(self, module: nn.Module) -> bool:
        """Tell of a change nobody can see: weights of `module` written through `.data`. False when they are not ours."""
        with self._context.lock:
            units = [unit for network in self._networks.values() if (unit := network.contents.mark_dirty(module)) is not None]
            for unit in units:
                self.backups.forget(unit)
            return bool(units)

    def demote(self, reason: str) -> None:
        """Give up for good: detach everything, keep the reason, tell the host."""
        if not self.demoted:
            self.demoted = self.last_error = reason
            logger.error("giving way to stock moving: %s", reason)
            self.detach()
            if self.on_demote is not None:
                self.on_demote(reason)

    def masters(self, names: Iterable[str]) -> dict[int, torch.Tensor]:
        """See `shadow.masters_of`."""
        with self._context.lock:
            return masters_of([self._networks[name] for name in names], self._current)
