"""One network: its units, what was learned about it, its plan, and which kind of pass is running.

Problem: order, plan, ring and resident set belong to a network - the UNet's blocks, the text encoder, the VAE - not to the
regions stock hooks one by one. A network is attached, learns in its first pass (`region_pass`), then streams (`streaming`)
until it is left. In between others may insert modules, replace parameters, interrupt with a BaseException, turn gradients
on: each pass's start looks, and falls back to moving regions and learning anew where it must.

Modules are held weakly (I7). All methods run under the mover's lock; passes run on the thread that calls the network.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable

import torch
from torch import nn

from lib_async_lowvram.actors import ObserverActor, SpanActor, UnitActor
from lib_async_lowvram.context import Context
from lib_async_lowvram.core.order import ExecutionOrder
from lib_async_lowvram.core.plan import Plan
from lib_async_lowvram.core.stats import Counters
from lib_async_lowvram.device.loose import loose_bytes
from lib_async_lowvram.device.weights import Change, Unit
from lib_async_lowvram.learned import Learned
from lib_async_lowvram.log import logger
from lib_async_lowvram.modules import ModuleTree
from lib_async_lowvram.network_spec import NetworkSpec
from lib_async_lowvram.pass_clock import PassClock
from lib_async_lowvram.region_pass import Observed, RegionPass
from lib_async_lowvram.streaming import Streaming
from lib_async_lowvram.unit_hooks import Installed
from lib_async_lowvram.unit_table import UnitTable


class Network:
    """See the module. `on_begin(network)` is called before a pass's first work: the mover leaves whatever else is in use.
    `on_end()` is called after a pass's last: what other threads asked for meanwhile is done then."""

    def __init__(
        self, name: str, spec: NetworkSpec, context: Context, on_begin: Callable[[Network], None], on_end: Callable[[], None]
    ) -> None:
        self.name = name
        self.context = context
        self.counters = Counters()
        self.order = ExecutionOrder()
        self.plan: Plan | None = None
        self.announced: frozenset[int] = frozenset()
        self.in_pass = False
        self.thread: int | None = None  # that runs the pass
        self.opened_by_caller = False
        self._on_begin = on_begin
        self._on_end = on_end
        self._tree = ModuleTree(spec)
        self._open_ended = spec.open_ended
        self._table = UnitTable(context.host)
        self._learned: Learned | None = None
        self._fingerprint: tuple[int, ...] = ()
        self._region: dict[int, int] = {}
        self._modules: list[weakref.ref[nn.Module]] = []
        self._streaming: Streaming | None = None
        self._regions: RegionPass | None = None
        self._opener: weakref.ref[nn.Module] | None = None  # what started a pass nobody announced
        self._firing = 0  # observed modules running now, one inside the other
        self._stale_plan = False
        self._clock = PassClock(context.streams, self.counters)
        self._unit_hooks: dict[int, Installed] = {}
        self._observers: list[Installed] = []
        self._span_hooks: Installed | None = None
        self.rebuild()
        if (span := self.span) is not None:
            self._span_hooks = Installed("span", span, SpanActor(self, spec.open_ended))
        self._observe_all()

    # -- the tree ------------------------------------------------------------------------------------------------------
    @property
    def span(self) -> nn.Module | None:
        return self._tree.span() if self._tree.span is not None else None

    @property
    def alive(self) -> bool:
        """False once the model is gone or has been emptied (moved to the meta device)."""
        return self._tree.alive and not any(
            parameter is not None and parameter.device.type == "meta"
            for unit in self.units[:1]
            for ref in unit.members
            if (module := ref()) is not None
            for parameter in module._parameters.values()
        )

    @property
    def units(self) -> list[Unit]:
        return self._table.units

    @property
    def unmanaged(self) -> list[nn.Module]:
        return self._table.unmanaged

    @property
    def learned(self) -> Learned | None:
        return self._learned

    @property
    def entered(self) -> bool:
        """Whether streamed passes hold device memory now."""
        return self._streaming is not None

    def modules(self) -> list[nn.Module]:
        """All modules of the network that still exist."""
        return [module for ref in self._modules if (module := ref()) is not None]

    def modules_of(self, region: int) -> list[nn.Module]:
        return [module for module in self.modules() if self._region.get(id(module)) == region]

    def modules_outside_regions(self) -> list[nn.Module]:
        return [module for module in self.modules() if id(module) not in self._region]

    def region_of(self, module: nn.Module) -> int | None:
        """The region that `module` is in or announces."""
        for number, trigger in enumerate(self._tree.triggers):
            if trigger() is module:
                return number
        return self._region.get(id(module))

    def units_of(self, region: int) -> list[Unit]:
        return [unit for unit in self.units if not unit.shared and self._unit_region(unit) == region]

    def units_outside_regions(self) -> list[Unit]:
        return [unit for unit in self.units if unit.shared or self._unit_region(unit) is None]

    def _unit_region(self, unit: Unit) -> int | None:
        return self._region.get(id(unit.members[0]()))

    def rebuild(self) -> None:
        """Look at the tree again and make the units match. What was learned is forgotten. Not while anything is in use."""
        self._remove_unit_hooks()
        self._learned, self.plan = None, None
        tree = self._tree.scan()
        self._table.rebuild(tree)
        self._modules = [weakref.ref(module) for module in tree.modules]
        self._region = tree.region
        self._fingerprint = self._tree.fingerprint()
        self._pin()

    def _pin(self) -> None:
        """Page-lock the masters, in order of size: the limit is best spent where most bytes stream."""
        host = self.context.host
        for unit in sorted(self.units, key=lambda unit: (unit.resident, -unit.nbytes)):
            if unit.nbytes and not host.is_pinned(unit.master):
                host.pin(unit.master)
            if self.context.checker is not None:
                self.context.host_ranges.add(unit.master)

    def judged(self, on: bool) -> contextlib.AbstractContextManager:
        """Our own work between two operations may touch host weights; the placement checker looks away meanwhile."""
        checker = self.context.checker
        return contextlib.nullcontext() if checker is None or on else checker.suspended()

    # -- hooks ---------------------------------------------------------------------------------------------------------
    def _observe_all(self) -> None:
        if not self._observers:
            span, observer = self.span, ObserverActor(self)
            triggers = [module for ref in self._tree.triggers if (module := ref()) is not None]
            modules = {id(module): module for module in [*self.modules(), *triggers] if module is not span}
            self._observers = [Installed("observed", module, observer) for module in modules.values()]

    def _observe_none(self) -> None:
        for installed in self._observers:
            installed.remove()
        self._observers = []

    def _install_unit_hooks(self) -> None:
        for unit in self.units:
            if unit.index in self.announced and unit.index not in self._unit_hooks and (module := unit.anchor()) is not None:
                self._unit_hooks[unit.index] = Installed("unit", module, UnitActor(self, unit))

    def hooks_off(self, unit: Unit) -> None:
        """A resident has arrived: it carries no hooks until the network is left."""
        installed = self._unit_hooks.pop(unit.index, None)
        if installed is not None:
            installed.remove()

    def _remove_unit_hooks(self) -> None:
        for installed in self._unit_hooks.values():
            installed.remove()
        self._unit_hooks.clear()

    # -- passes --------------------------------------------------------------------------------------------------------
    def begin_pass(self) -> None:
        """A pass starts on the calling thread. One that is still open (a BaseException, an open end) is closed first."""
        self.end_pass(complete=self._ends_by_itself)
        self._on_begin(self)
        if self._tree.fingerprint() != self._fingerprint or not all(unit.alive for unit in self.units):
            logger.debug("%s: its modules changed, learning anew", self.name)
            self._leave_streaming()
            self._observe_none()
            self.rebuild()
        self.in_pass = True
        self.thread = threading.get_ident()
        context = self.context
        if torch.is_grad_enabled() or self._learned is None:
            self._leave_streaming()
            self._observe_all()
            context.peaks.learning(True)
            self._regions = RegionPass(self, observe=not torch.is_grad_enabled())
        else:
            self._observe_none()
            if self._stale_plan:
                self._leave_streaming()
            self._enter()
            with self.judged(False):
                self._streaming.begin_pass()
            self._clock.begin()
        if context.checker is not None:
            context.checker.enter()

    @property
    def _ends_by_itself(self) -> bool:
        """Whether an open pass counts as complete when something else starts: nobody would have said so."""
        return self._open_ended or self._opener is not None

    def end_pass(self, complete: bool = True) -> None:
        """The pass ended; `complete` unless an exception cut it short."""
        if not self.in_pass:
            return
        if self.context.checker is not None:
            self.context.checker.exit()
        self.in_pass = False
        self._opener = None
        self._firing = 0
        if self._regions is not None:
            observed = self._regions.close()
            self._regions = None
            self.context.peaks.learning(False)
            if observed is not None:
                self.counters.learning_passes += 1
                if complete and observed.firings:
                    self._learn(observed)
        elif self._streaming is not None:
            self._end_streamed_pass(complete)
        self._on_end()

    def _end_streamed_pass(self, complete: bool) -> None:
        streaming = self._streaming
        with self.judged(False):
            streaming.finish_leftovers()
            streaming.all_arrived()
            streaming.sweep()
            if self.order.end_pass(complete):
                self.counters.relearned += 1
                self._stale_plan = True
        self._clock.end(complete)

    def _learn(self, observed: Observed) -> None:
        tree = self._tree.scan()
        outer = [span for span in (self.span,) if span is not None]
        _, announced = self._table.join_silent(tree, observed.fired, outer)
        self.announced = frozenset(announced)
        buffers = loose_bytes(tree.modules, self.unmanaged)
        self._learned = Learned.of(observed, self.units, self.announced, buffers)
        self._stale_plan = True
        self._observe_none()
        self._pin()

    def _enter(self) -> None:
        """Make a plan if there is none for the present budget, and take device memory."""
        if self._streaming is not None:
            return
        with self.judged(False):
            self._make_plan()
            try:
                self._streaming = Streaming(self)
            except torch.cuda.OutOfMemoryError as error:
                least = self._learned.least_budget(self.units)
                logger.warning("%s: %s; trying the least budget, %d MB", self.name, str(error).splitlines()[0], least >> 20)
                self._make_plan(least)
                self._streaming = Streaming(self)
            self._install_unit_hooks()
            self._streaming.issue_ahead()

    def _make_plan(self, budget_bytes: int | None = None) -> None:
        if budget_bytes is None:
            budget_bytes = self.context.budget()
        config = self.context.config
        plan = self._learned.plan(self.units, budget_bytes, config.lookahead_bytes, config.small_leaf_bytes)
        if self.plan is None or plan.notes != self.plan.notes:
            for note in plan.notes:
                logger.info("%s: %s", self.name, note)
        self.plan = plan
        for unit in self.units:
            unit.resident = unit.index in plan.resident
        self.order.learn(unit for unit, _ in self._learned.steps if unit not in plan.resident)
        self._stale_plan = False

    def arrival_order(self) -> list[Unit]:
        """Residents in the order in which they are wanted: those nobody announces first, then as they fire."""
        residents = [self.units[index] for index in self.plan.resident]
        return sorted(residents, key=lambda unit: (unit.index in self.announced, self.first_firing(unit), unit.index))

    def first_firing(self, unit: Unit) -> int:
        """Place of the unit's first firing in the learned pass; after all others when it did not fire."""
        return self._learned.first.get(unit.index, len(self._learned.steps))

    def prepare(self) -> None:
        """Start the first onloads now, if the network has learned and nothing else is in use."""
        if self._learned is not None and not self.in_pass and not torch.is_grad_enabled():
            self._on_begin(self)
            if self._tree.fingerprint() == self._fingerprint:
                self._enter()

    def replan(self) -> None:
        """The configuration changed: plan anew at the next pass's start."""
        self._stale_plan = True

    def leave(self) -> None:
        """Masters true and published, device memory given back. Blocks the host until nothing is in flight."""
        self.end_pass(complete=self._ends_by_itself)
        self._leave_streaming()

    def _leave_streaming(self) -> None:
        if self._streaming is not None:
            with self.judged(False):
                self._streaming.close()
            self._streaming = None
            self._install_unit_hooks()

    def detach(self) -> None:
        """Leave, and take every hook off."""
        self.leave()
        self._remove_unit_hooks()
        self._observe_none()
        if self._span_hooks is not None:
            self._span_hooks.remove()
            self._span_hooks = None
        for unit in self.units:
            self.context.host.unpin(unit.master)

    # -- what hooks and passes ask for ---------------------------------------------------------------------------------
    def acquire(self, unit: Unit, module: nn.Module) -> None:
        """A unit's anchor is about to run."""
        if not self.in_pass:
            self.begin_pass()  # nobody announced it; it lasts until the network is left or announced
            self._opener = weakref.ref(module)
        if self._streaming is not None:
            with self.judged(False):
                self._streaming.acquire(unit)

    def release(self, unit: Unit) -> None:
        """A unit's anchor has run."""
        if self._streaming is not None:
            with self.judged(False):
                self._streaming.release(unit)

    def observe(self, module: nn.Module) -> None:
        """Any module is about to run in a pass that moves regions."""
        opener = self._opener() if self._opener is not None else None
        if opener is module and not self._firing:
            self.end_pass()  # an unannounced pass starts over where it started
        if not self.in_pass:
            self.begin_pass()
            self._opener = weakref.ref(module)
        self._firing += 1
        self.running(module)

    def observed(self) -> None:
        """It has run."""
        self._firing = max(0, self._firing - 1)

    def running(self, module: nn.Module) -> None:
        """`module` runs now: in a pass that moves regions, its region is needed."""
        if self._regions is not None:
            self._regions.before(module)

    def moved(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The arguments with tensors on another device moved (the WebUI sends ids to where the weight was), or None."""
        device = self.context.streams.device
        if device.type == "cpu":
            return None

        def move(value: object) -> object:
            return value.to(device) if isinstance(value, torch.Tensor) and value.device != device else value

        if not any(isinstance(value, torch.Tensor) and value.device != device for value in (*args, *kwargs.values())):
            return None
        return tuple(map(move, args)), {key: move(value) for key, value in kwargs.items()}

    def true_up(self, unit: Unit) -> None:
        """Before an onload of a unit that is on the host: take changes made there as the new truth."""
        change = unit.host_change()
        if change is Change.LAYOUT:
            self.adopt(unit)
        elif change is Change.VALUES or unit.dirty:
            unit.accept_versions()

    def adopt(self, unit: Unit) -> None:
        """Somebody put other tensors there: pack what is there now. Blocks the host."""
        self.counters.adopted += 1
        before = unit.nbytes
        unit.pack()
        self.context.host.pin(unit.master)
        if self.context.checker is not None:
            self.context.host_ranges.add(unit.master)
        if unit.nbytes != before:
            self._stale_plan = True

    def mark_dirty(self, module: nn.Module) -> bool:
        """Somebody wrote `module`'s weights without a trace (through `.data`). True when they are ours."""
        unit = self._table.unit_of(module)
        if unit is not None:
            unit.dirty = True
        return unit is not None

    def copying(self, lane: str, unit: Unit) -> None:
        """A copy was enqueued: tell the trace whose it is."""
        if self.context.trace is not None:
            self.context.copies.setdefault(lane, deque()).append(unit.name)
