"""Out of memory inside a UNet pass: residents are given up, and the pass is tried once more, before the error reaches the host.

Problem: stock `--lowvram` has one block of the UNet on the device, and all the rest for computing. Ours has a resident set, sized by
what computing was seen or thought to need; where it needs more, a picture would fail that stock makes.

The seam is `apply_model` of the model's class: the UNet's whole call for one step, one pass, with its inputs at hand, reached by
every sampler of the host (k-diffusion's, the timesteps ones, LCM, refiner and hires passes, each tile of an extension that tiles)
and of SD1, SD2 and SDXL alike. Inside the seam, and so repeated: the host's casts of inputs, ControlNet and whatever else patches
the UNet's forward, LoRA, ToMe, Hypertile. Outside, and so run once: CFG, masks, the host's callbacks, the sampler's own noise. A
pass is repeated only where that must give the same pixels (I1):

- its inputs are as they were: containers are put back, and a tensor that was written to in place forbids it;
- random states are put back (`random_state`), for what draws inside;
- a LoRA layer that was half patched still carries the old names and is patched anew from its backup; the extension swallows an
  error in one layer and calls it patched, so here running out of memory there ends the first try instead (`lora_memory`);
- gradients are off: nobody keeps what the first try computed.

One that fails again fails as it would under stock: the second error goes to the host, untouched. What a pass was given is never
kept beyond it. Called on the thread that computes; `watch` and `unwatch` by `lowvram.Integration` under its lock.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.log import logger
from lib_async_lowvram.rescue import in_one_line
from lib_async_lowvram.webui import patching
from lib_async_lowvram.webui.lora_memory import noticing
from lib_async_lowvram.webui.memory_errors import out_of_memory
from lib_async_lowvram.webui.random_state import random_state

METHOD = "apply_model"


class Inputs:
    """The arguments of a call: what is in each container, and how often each tensor was written to."""

    def __init__(self, *arguments: Any) -> None:
        self._containers: list[tuple[dict | list, dict | list]] = []
        self._tensors: list[tuple[torch.Tensor, int | None]] = []
        self._look(arguments)

    def _look(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._tensors.append((value, None if value.is_inference() else value._version))
        elif isinstance(value, (dict, list)):
            inside = dict(value) if isinstance(value, dict) else list(value)
            self._containers.append((value, inside))
            for each in inside.values() if isinstance(inside, dict) else inside:
                self._look(each)
        elif isinstance(value, tuple):
            for each in value:
                self._look(each)

    @property
    def unwritten(self) -> bool:
        """Whether every tensor is known to hold what it held."""
        return all(version is not None and tensor._version == version for tensor, version in self._tensors)

    def put_back(self) -> None:
        """Every container holds again what it held."""
        for container, inside in self._containers:
            if isinstance(container, dict):
                container.clear()
                container.update(inside)
            else:
                container[:] = inside


class Retries:
    """See the module. `name_of(model)`: of its UNet at the mover, or None for a model that is not managed. `make_room(name)`: gives
    up what can be given up in favour of that network; bytes.

    Attributes:
        tried: passes that were repeated. failed: those that failed again. last_error: what a pass failed with, in one line, or None.
    """

    def __init__(self, device: torch.device, name_of: Callable[[nn.Module], str | None], make_room: Callable[[str], int]) -> None:
        self._device = device
        self._name_of = name_of
        self._make_room = make_room
        self._owners: list[type] = []
        self.tried = self.failed = 0
        self.last_error: str | None = None

    def watch(self, model: nn.Module) -> None:
        """From now on passes of models of this class go through here. A class without `apply_model` is left alone."""
        owner = next((each for each in type(model).__mro__ if METHOD in vars(each)), None)
        if owner is not None and owner not in self._owners:
            patching.put(owner, METHOD, self._on_apply_model)
            self._owners.append(owner)

    def unwatch(self) -> None:
        """The host's own functions are back."""
        while self._owners:
            patching.remove(self._owners.pop(), METHOD)

    def _on_apply_model(self, stock: Callable, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = self._name_of(model)
        if name is None or torch.is_grad_enabled():
            return stock(model, *args, **kwargs)
        inputs = Inputs(args, kwargs)
        put_back = random_state(getattr(getattr(model, "model", None), "diffusion_model", None), self._device)
        with noticing(lambda: inputs.unwritten) as lora:
            try:
                return stock(model, *args, **kwargs)
            except Exception as error:
                if not out_of_memory(error) or not inputs.unwritten:
                    raise
                self.last_error = in_one_line(error)
                given = self._make_room(name)
                # Stock would not have noticed that a layer was left unpatched, and gone on.
                if not given and not lora.noticed:
                    logger.warning("a UNet pass ran out of memory, and there is nothing to give up for it: %s", self.last_error)
                    raise
        # Here the error is gone, and with it the frames that hold what the first try computed; but for those in cycles.
        gc.collect()
        logger.warning("a UNet pass ran out of memory: it is tried again with %d MB less for weights (%s)", given >> 20, self.last_error)
        self.tried += 1
        inputs.put_back()
        put_back()
        try:
            return stock(model, *args, **kwargs)
        except Exception as error:
            self.failed += 1
            self.last_error = in_one_line(error)
            logger.warning("the UNet pass failed again, which the WebUI is told: %s", self.last_error)
            raise
