"""What the hooks tell of a network: which of its modules runs now, and what that means for the pass.

Problem: most passes are announced - a call of the module that spans them, or `AsyncModelMover.running`. But anybody may call a
part of a network alone (an embedding created from one layer, a block tried by another extension): then the first module that
fires opens a pass, and when it fires again, a new one. And gradients may be turned on anywhere: what autograd keeps views of
must not be overwritten, so that pass goes on as stock does.

Called by the hooks' actors, under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib_async_lowvram.device.weights import Unit

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network
    from lib_async_lowvram.uses import Uses


class Calls:
    """See the module."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._opener: weakref.ref[nn.Module] | None = None  # what started a pass nobody announced
        self._opener_streams = False  # whether that is a streamed unit's anchor
        self._firing = 0  # observed modules running now, one inside the other

    @property
    def unannounced(self) -> bool:
        """Whether the open pass was opened by the first module that fired."""
        return self._opener is not None

    @property
    def end_by_themselves(self) -> bool:
        """Whether an open pass counts as complete when something else starts: nobody would have said so. A stray call of one
        leaf, in a network whose passes are announced, is not a pass; nor is what runs still (an encoder that is called itself,
        and in it the module that announces the pass)."""
        if self._opener is not None and self._firing:
            return False
        network = self._network
        return network.open_ended or (self._opener is not None and network.contents.span is None)

    def pass_ended(self) -> None:
        """The open pass is over, however it ended."""
        self._opener = None
        self._firing = 0

    # -- units, while they stream ----------------------------------------------------------------------------------------
    def acquire(self, unit: Unit, module: nn.Module) -> None:
        """A unit's anchor is about to run."""
        network = self._network
        streaming = network.streaming
        if self._opener is None and streaming is not None and network.in_pass and network.context.checker is None:
            if not network.undecided and not torch.is_grad_enabled():
                streaming.uses.acquire(unit)  # as nearly always
                return
        self._acquire(unit, module)

    def _acquire(self, unit: Unit, module: nn.Module) -> None:
        """The same where more than the unit may have to be seen to."""
        network = self._network
        opener = self._opener() if self._opener is not None else None
        if opener is not None and network.streaming is not None and not network.streaming.uses.any:
            if opener is module:
                network.end_pass(self.end_by_themselves)  # an unannounced pass starts over where it started
            elif not unit.resident and not self._opener_streams:
                self._opener = weakref.ref(module)  # that one will have no hooks when it fires again
                self._opener_streams = True
        if not network.in_pass:
            network.begin_pass()  # nobody announced it; it lasts until the network is left or announced
            self._opener = weakref.ref(module)
            self._opener_streams = not unit.resident
            if network.regions is not None:
                self.running(module)  # gradients are on; the observer just put on it comes too late for this call
        if network.undecided:
            network.begin_moving()
        elif network.streaming is not None and torch.is_grad_enabled():
            network.stop_streaming()
            self.running(module)
        if network.streaming is not None:
            with network.judged(False):
                network.streaming.uses.acquire(unit)

    def release(self, unit: Unit) -> None:
        """A unit's anchor has run."""
        network = self._network
        streaming = network.streaming
        if streaming is None:
            return
        if torch.is_grad_enabled():
            network.stop_streaming()
            self.running(unit.anchor())
        elif network.context.checker is None:
            streaming.uses.release(unit)
        else:
            with network.judged(False):
                streaming.uses.release(unit)

    def hold(self) -> Uses | None:
        """From now on units that were used stay; `let_go` wants what this gives. None where nothing streams, or all stay already."""
        streaming = self._network.streaming
        return streaming.uses if streaming is not None and streaming.uses.hold() else None

    def let_go(self, held: Uses, module: nn.Module) -> None:
        """End of a hold around `module`. The network may have been left meanwhile, and entered again."""
        network = self._network
        try:
            if network.streaming is not None and network.streaming.uses is held:
                with network.judged(False):
                    held.let_go()
        except BaseException as error:
            if not network.met(error, goes_on=True, module=module):
                raise

    # -- any module, while regions move ----------------------------------------------------------------------------------
    def observe(self, module: nn.Module) -> None:
        """Any module is about to run in a pass that moves regions."""
        network = self._network
        opener = self._opener() if self._opener is not None else None
        if opener is module and not self._firing:
            network.end_pass(self.end_by_themselves)  # an unannounced pass starts over where it started
        if not network.in_pass:
            network.begin_pass()
            self._opener = weakref.ref(module)
            self._opener_streams = False
        self.running(module)
        if network.regions is not None:
            self._firing += 1  # otherwise the observers have just been taken off, and nobody will say that it has run

    def observed(self, module: nn.Module) -> None:
        """It has run."""
        self._firing = max(0, self._firing - 1)
        if self._network.regions is not None:
            self._network.regions.after(module)

    def running(self, module: nn.Module) -> None:
        """`module` runs now: in a pass that moves regions, its region is needed."""
        network = self._network
        if network.undecided:
            network.begin_moving()
        if network.regions is not None:
            network.regions.before(module)
