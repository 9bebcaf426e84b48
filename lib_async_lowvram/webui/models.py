"""The live models of the host that are on the mover: taking one over, giving it back.

Problem: the WebUI may keep several models in memory, switch between them, and throw any of them away. All of them share one
mover - one ring, one budget, one pinned limit - under names of their own, and leaving one network for another's is the mover's
business whichever model they belong to.
Invariants: I6 - `release` ends with stock's own hook objects on the model, its weights on the host and its networks unknown
to the mover, even when the mover fails on the way. I7 - models are held weakly.
Called by `lowvram.Integration` under its lock, on the thread that loads, switches or throws away a model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from lib_async_lowvram.log import logger
from lib_async_lowvram.webui.on_disk import WeightsOnDisk
from lib_async_lowvram.webui.regions import network_specs
from lib_async_lowvram.webui.stock import Harvest, Link, Listener, put_back, swap_in


@dataclass(frozen=True, eq=False)
class ManagedModel:
    """One live model, held weakly, and the link to the stand-ins on it."""

    model: weakref.ref[nn.Module]
    link: Link


class ManagedModels:
    """`open_mover`: makes the mover when the first model needs it, not before (I7). `clear_device`: makes stock move
    everything of its own to the host, which the mover expects of a model it is given."""

    def __init__(self, listener: Listener, open_mover: Callable[[], Any], clear_device: Callable[[], None]) -> None:
        self._listener = listener
        self._open_mover = open_mover
        self._clear_device = clear_device
        self._models: list[ManagedModel] = []
        self.mover: Any = None
        self.on_disk = WeightsOnDisk()

    def holding(self, module: nn.Module) -> AbstractContextManager[None]:
        """See `AsyncModelMover.holding`; nothing while no model is on the mover."""
        return nullcontext() if self.mover is None else self.mover.holding(module)

    def keep_on_disk(self, wanted: bool) -> None:
        """See `WeightsOnDisk.follow`."""
        if self.mover is not None and (wanted or self.on_disk.keeps):
            live = [model for managed in self._models if (model := managed.model()) is not None]
            self.on_disk.follow(live, wanted, self.mover)

    def __len__(self) -> int:
        return len(self._models)

    def find(self, model: nn.Module | None) -> ManagedModel | None:
        return next((managed for managed in self._models if model is not None and managed.model() is model), None)

    def model_of(self, link: Link) -> nn.Module | None:
        """The live model whose stand-ins know `link`."""
        return next((managed.model() for managed in self._models if managed.link is link), None)

    def adopt(self, found: Harvest) -> None:
        """Take over a model that stock has set up, as harvested; leaves to stock what it cannot describe."""
        specs = network_specs(found)
        if not specs:
            logger.info("stock put no hooks on this model's UNet that could be told apart: left to stock")
            return
        self.forget_dead()
        self._make_room(found.model)
        self._clear_device()  # a model that has been in use: its last region is on the device
        if self.mover is None:
            self.mover = self._open_mover()
        link = Link({network: self._free_name(network) for network in specs})
        managed = ManagedModel(weakref.ref(found.model), link)
        self._models.append(managed)
        try:
            self.mover.attach({link.names[network]: spec for network, spec in specs.items()})
            for network, spec in specs.items():
                if spec.span is not None:
                    link.watch_pass_start(network, spec.span)
            swap_in(found, link, self._listener)
        except BaseException:
            self.release([managed])
            raise

    def _free_name(self, network: str) -> str:
        """"unet" for the first live model, "unet#2" for a second one that is kept in memory beside it."""
        taken = {name for managed in self._models for name in managed.link.names.values()}
        number, name = 1, network
        while name in taken:
            number += 1
            name = f"{network}#{number}"
        return name

    def _make_room(self, newcomer: nn.Module) -> None:
        """When the masters of all models cannot be pinned, the inactive ones go back to stock, which unpins them; they are
        taken over again when the host applies `--lowvram` to them on their return."""
        if not self._models:
            return
        status = self.mover.status()
        needed = sum(parameter.numel() * parameter.element_size() for parameter in newcomer.parameters())
        if status["pinned_bytes"] + needed > status["pinned_limit_bytes"]:
            self.release_all()

    def release(self, models: Iterable[ManagedModel]) -> None:
        """Stock's hooks back on these models, their weights on the host, nothing of theirs known to the mover."""
        for managed in list(models):
            self._models.remove(managed)
            try:
                attached = self.mover.status()["networks"]
                self.mover.detach([name for name in managed.link.names.values() if name in attached])
            finally:
                put_back(managed.model(), managed.link)

    def release_all(self) -> None:
        self.release(self._models)

    def forget_dead(self) -> None:
        """Let go of models that nobody else holds any more."""
        self.release([managed for managed in self._models if managed.model() is None])

    def close(self) -> None:
        """Give everything back and close the mover."""
        try:
            try:
                self.keep_on_disk(False)
            finally:
                self.release_all()  # whatever became of the weights on disk
        finally:
            if self.mover is not None:
                self.mover.close()
                self.mover = None
