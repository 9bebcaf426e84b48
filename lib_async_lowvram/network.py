"""One network: which kind of pass is running, what was learned, the plan, and when device memory is taken and given back.

Problem: order, plan, ring and resident set belong to a network - the UNet's blocks, the text encoder, the VAE - not to the
regions stock hooks one by one. A network learns in its first pass (`region_pass`), then streams (`streaming`) until it is
left. In between others may insert modules, interrupt with a BaseException, or turn gradients on: each pass's start looks,
and falls back to moving regions and learning anew where it must.

All methods run under the mover's lock; passes run on the thread that calls the network.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator

import torch
from torch import nn

from lib_async_lowvram.calls import Calls
from lib_async_lowvram.contents import Contents
from lib_async_lowvram.context import Context
from lib_async_lowvram.core.order import ExecutionOrder
from lib_async_lowvram.core.plan import Plan
from lib_async_lowvram.core.stats import Counters
from lib_async_lowvram.hook_set import HookSet
from lib_async_lowvram.kept import Kept
from lib_async_lowvram.learned import Learned
from lib_async_lowvram.log import logger
from lib_async_lowvram.network_spec import NetworkSpec
from lib_async_lowvram.pass_clock import PassClock
from lib_async_lowvram.passes import Passes
from lib_async_lowvram.planning import Planning
from lib_async_lowvram.region_pass import Observed, RegionPass
from lib_async_lowvram.rescue import abandon, in_one_line, is_ours
from lib_async_lowvram.running import is_running
from lib_async_lowvram.streaming import Streaming

NOTHING = contextlib.nullcontext()


class Network:
    """See the module.

    Attributes:
        contents: its modules and units. order: what it follows. planning: what it learned, and its plan.
        kept: what the learning pass left on the device for the next one, or was fetched ahead of it.
        calls: what the hooks tell of it. open_ended: its passes have no end of their own.
        streaming: what holds device memory, or None. regions: of a pass that moves regions, or None.
        left_standing: of one that is over, for a `backward` that may come yet, or None.
        undecided: a pass is open, and which kind it is the first module to fire tells. detached: for good.
        fault: what we found ourselves to be wrong in; "" if nothing.
        in_pass: between a pass's start and end; thread: that runs it. opened_by_caller: through `AsyncModelMover.running`.
    """

    def __init__(self, name: str, spec: NetworkSpec, context: Context, passes: Passes) -> None:
        self.name = name
        self.context = context
        self.counters = Counters()
        self.contents = Contents(spec, context, self.counters)
        self.order = ExecutionOrder()
        self.planning = Planning(name, context.measured)
        self.kept = Kept(context.streams)
        self.in_pass = False
        self.thread: int | None = None
        self.opened_by_caller = False
        self.detached = False
        self.fault = ""
        self._passes = passes
        self.open_ended = spec.open_ended
        self.streaming: Streaming | None = None
        self.regions: RegionPass | None = None
        self.undecided = False
        self.left_standing: RegionPass | None = None  # over, but `backward` may come yet
        self._clock = PassClock(context.streams, self.counters)
        self.calls = Calls(self)
        self.hooks = HookSet(self, spec.open_ended)
        self.hooks.observe(True)

    @property
    def plan(self) -> Plan | None:
        """What it follows; None before it has learned."""
        return self.planning.plan

    @property
    def learned(self) -> Learned | None:
        """What its learning pass and later ones taught."""
        return self.planning.learned

    @property
    def entered(self) -> bool:
        """Whether streamed passes hold device memory now."""
        return self.streaming is not None

    def judged(self, on: bool) -> contextlib.AbstractContextManager:
        """Our own work between two operations may touch host weights; the placement checker looks away meanwhile."""
        checker = self.context.checker
        return NOTHING if checker is None or on else checker.suspended()

    # -- passes --------------------------------------------------------------------------------------------------------
    def begin_pass(self, announced: bool = False, shape: Hashable = None) -> None:
        """A pass starts on the calling thread. One that is still open (a BaseException, an open end) is closed first.
        `announced`: nothing runs yet, so whether gradients are on now says nothing. `shape`: of its arguments, where known."""
        self._passes.wait_for_turn()
        if self.detached:
            return  # meanwhile: this call's hooks are its last, and its weights are where stock's moves look for them
        try:
            self._begin_pass(announced, shape)
        except BaseException as error:
            if not self.met(error, goes_on=True):
                raise

    def _begin_pass(self, announced: bool, shape: Hashable) -> None:
        self.end_pass(complete=self.calls.end_by_themselves)
        if not self._passes.take_over(self):
            return  # its weights are gone, to the meta device say: its hooks have been taken off
        if self.contents.changed:
            logger.debug("%s: its modules changed, learning anew", self.name)
            self._give_back()
            self.hooks.units_off()
            self.hooks.observe(False)
            self.contents.rebuild()
            self.planning.forget()
        self.planning.began(shape, entering=self.streaming is None)
        for unit in self.contents.units:
            unit.suspect = self.context.config.always_write_back
        self.in_pass = True
        self.thread = threading.get_ident()
        if self.context.checker is not None:
            self.context.checker.enter()
        if announced and torch.is_grad_enabled():
            self._give_back()  # arrived residents would fire unnoticed
            self.hooks.observe(True)
            self.undecided = True
        else:
            self.begin_moving()

    def begin_moving(self) -> None:
        """The pass's first module is about to run: regions move, or units stream."""
        self.undecided = False
        if torch.is_grad_enabled() or self.learned is None:
            self._begin_moving_regions()
        else:
            self._begin_streaming()

    def _begin_moving_regions(self, observe: bool = True) -> None:
        self.context.ahead.give_up()
        self._give_back()
        self.hooks.observe(True)
        self.context.peaks.learning(True)
        self.regions = RegionPass(self, observe=observe and not torch.is_grad_enabled())
        self.regions.start()

    def _begin_streaming(self) -> None:
        self.hooks.observe(False)
        if self.planning.stale or self.contents.resized:
            self._give_back()
        self.context.ahead.heed_budget(self)
        with self.judged(False):
            self._enter()
            self.streaming.begin_pass()
            self.context.ahead.pass_begun(self)
        self._clock.begin()

    @property
    def busy(self) -> bool:
        """Whether some thread is inside a pass or a stray call, as far as can be known: an interrupt leaves passes open, some
        have no end of their own, and residents are called without a trace."""
        if not self.in_pass and self.streaming is None:
            return False
        if not self.in_pass or self.open_ended or self.calls.unannounced:
            # Not only what streams: a resident, or one whose region was brought for a stray call, is read without a trace.
            in_use = self.streaming is not None and self.streaming.uses.any
            return in_use or is_running(self.thread, *self.contents.modules())
        span = self.contents.span
        return self.opened_by_caller or span is None or is_running(self.thread, span)

    def end_pass(self, complete: bool = True, leaving: bool = False) -> None:
        """The pass ended; `complete` unless an exception cut it short. `leaving`: device memory goes next."""
        if not self.in_pass:
            return
        with self.guarded():
            self._end_pass(complete, leaving)
        self._passes.ended(complete and not leaving)

    def _end_pass(self, complete: bool, leaving: bool) -> None:
        if self.context.checker is not None:
            self.context.checker.exit()
        self.in_pass = self.undecided = False
        self.calls.pass_ended()
        if self.regions is not None and not self.regions.observes and complete and not leaving:
            self.left_standing, self.regions = self.regions, None
        elif self.regions is not None:
            # Whoever writes to masters without a trace would be overwritten by what is kept.
            observed = self.regions.close(keep=complete and not leaving and not self.context.config.always_write_back)
            self.regions = None
            if observed is not None:
                self.counters.learning_passes += 1
                self.context.note_activations(self.planning.key)
                if complete and observed.firings:
                    self._learn(observed, leaving)
                else:
                    self.kept.reduce_to(())
            self.context.peaks.learning(False)
        elif self.streaming is not None:
            with self.judged(False):
                self.streaming.end_pass(complete)
                if self.order.end_pass(complete):
                    self.counters.relearned += 1
                    self.planning.reorder(self.order.sequence)
                    self.streaming.uses.resynchronise()
            self._clock.end(complete)
            with self.judged(False):
                self.streaming.settle()
            if self.context.config.always_write_back:
                self._give_back()  # whoever writes to masters now leaves no trace, either: all of them travel again

    def _learn(self, observed: Observed, leaving: bool) -> None:
        contents = self.contents
        contents.join(observed.fired, observed.inside)
        in_step = self.context.streams.knows_stalls
        self.planning.learn(Learned.of(observed, contents.units, contents.announced, contents.loose_bytes, in_step), contents.units)
        self.hooks.observe(False)
        self.hooks.units_on()
        if not leaving:
            self._make_plan(self.context.budget(self.planning.key))

    def stop_streaming(self) -> None:
        """Gradients came on in the middle of a pass: autograd keeps views of what the ring would overwrite."""
        self.streaming.share()
        self._clock.end(complete=False)
        self.order.end_pass(complete=False)
        self._begin_moving_regions()

    # -- device memory -------------------------------------------------------------------------------------------------
    def _enter(self) -> None:
        """Make a plan for the present budget, and take device memory."""
        if self.streaming is not None:
            return
        self._clear_standing()
        self.context.ahead.give_up()  # for another one: what was for this one was handed over
        self._make_plan(self.context.budget(self.planning.key))
        try:
            self.streaming = Streaming(self)
        except torch.cuda.OutOfMemoryError as error:
            least = self.planning.least_budget(self.contents.units)
            self._passes.last_error = f"{self.name}: {in_one_line(error)}"
            logger.warning("%s; trying the least budget, %d MB", self._passes.last_error, least >> 20)
            self.planning.most_bytes = least
            self._make_plan(least)
            self.streaming = Streaming(self)
        self.hooks.units_on()
        self.streaming.uses.issue_ahead()

    def _make_plan(self, budget_bytes: int) -> None:
        units = self.contents.units
        self.planning.make(units, budget_bytes, self.context.config)
        self.kept.reduce_to(unit for unit in units if unit.resident)
        self.order.learn(self.planning.streamed_steps())
        self.contents.resized = False

    def prepare(self) -> None:
        """Start the first onloads now, if the network has learned and gradients are off."""
        if self.learned is None or self.busy or torch.is_grad_enabled() or self.contents.changed:
            return
        self.end_pass(self.calls.end_by_themselves)
        if self._passes.take_over(self):
            if self.planning.stale or self.contents.resized:
                self._give_back()
            with self.judged(False):
                self._enter()

    def leave(self) -> None:
        """Masters true and published, device memory given back. Blocks the host until nothing is in flight."""
        self.end_pass(complete=self.calls.end_by_themselves, leaving=True)
        with self.guarded():
            self._give_back()
        self.planning.most_bytes = None

    def _give_back(self) -> None:
        self.kept.reduce_to(())
        self._clear_standing()
        if self.streaming is not None:
            with self.judged(False):
                self.streaming.close()
            self.streaming = None
            self.hooks.units_on()
        self.kept.settle()

    def _clear_standing(self) -> None:
        if self.left_standing is not None:
            self.left_standing.close(keep=False)
            self.left_standing = None
            self.context.peaks.learning(False)

    # -- faults --------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Work of ours at a pass's end or between two: an error in it does not reach the host, unless weights were lost by it."""
        try:
            yield
        except BaseException as error:
            if not self.met(error):
                raise

    def met(self, error: BaseException, goes_on: bool = False, module: nn.Module | None = None) -> bool:
        """Something was raised in the middle of our work; whether the host need not know. A fault of ours (`rescue.is_ours`): see
        `give_way`. Anything else, a device without memory, a copy that failed, an interrupt: the weights are brought home and all
        memory is given back, and the pass is over, if one is open. The next one starts anew."""
        if is_ours(error):
            self.give_way(error, goes_on, module)
            return True
        lost = abandon(self)
        if self.learned is None:
            self.hooks.observe(not self.detached)
        elif not self.detached:
            self.hooks.units_on()
        self._passes.last_error = f"{self.name}: {in_one_line(error)}"
        logger.warning("%s; its weights are %s", self._passes.last_error, "not all on the host" if lost else "back on the host")
        self.end_pass(complete=False)
        return isinstance(error, Exception) and not goes_on and not lost

    def give_way(self, error: Exception, goes_on: bool = False, module: nn.Module | None = None) -> None:
        """We are wrong, and say so: everything is put back, and the mover gives way to stock as soon as no pass is open. One that
        `goes_on` does so with whole regions, as stock would. `module`: is about to run in it, or has just run."""
        logger.error("%s: a fault of this extension; the picture goes on as stock would make it", self.name, exc_info=error)
        # Without the error's text, which may hold anything: this goes to the status route as well.
        self.fault = self.fault or f"{self.name}: a fault of this extension ({type(error).__name__}), see the log"
        abandon(self)
        if not goes_on:
            return
        if not self.in_pass:
            self.in_pass, self.thread = True, threading.get_ident()
            if self.context.checker is not None:
                self.context.checker.enter()
        self.undecided = False
        self._begin_moving_regions(observe=False)
        if module is not None:
            self.calls.running(module)

    def detach(self) -> None:
        """Leave, take every hook off, unpin."""
        try:
            self.leave()
        finally:
            self.detached = True
            self.hooks.remove()
            self.contents.release()
            self.context.peaks.forget(self.name)
            self.context.timeline.forget(self.name)
