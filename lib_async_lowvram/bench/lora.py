"""LoRA as the WebUI's built-in extension applies it, on our UNet: inside each layer's forward, on the device, in place.

Problem: what a change of LoRA costs depends on who moves the weights, so the benchmark needs the same patching over every
contender. As the WebUI does it (extensions-builtin/Lora/networks.py, `network_apply_weights`): a layer whose names differ
from those wanted takes a backup to the host if it has none, is restored from it, and, if the LoRA has a module for it, gets
`weight + up @ down`; every named layer is backed up and restored, patched or not. Backups are pageable, so each of their
moves blocks.

On the simulated device these moves go through its copy engines, as they would over the link. `backups` (of a mover) is asked
first where given. Called on the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lib_async_lowvram.backups import Backups
from lib_async_lowvram.device.dense import as_bytes
from lib_async_lowvram.device.streams import Streams

RANK = 8
NAMED = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
"""Layer types that the WebUI patches. Of these, ours has modules for the linear ones, as most LoRA files do."""


class Lora:
    """`strength`: None for no LoRA, else how strongly it is wanted from the next pass on.

    Attributes:
        moved_bytes: of backups and restores, both ways, that crossed the link.
    """

    def __init__(self, model: nn.Module, streams: Streams, seed: int = 0) -> None:
        self.strength: float | None = None
        self.backups: Backups | None = None
        self.moved_bytes = 0
        self._streams = streams
        self._layers: list[nn.Module] = []
        self._current: dict[nn.Module, float | None] = {}
        self._kept: dict[nn.Module, dict[str, torch.Tensor]] = {}
        self._factors: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        generator = torch.Generator().manual_seed(seed)
        for layer in model.modules():
            if not isinstance(layer, NAMED):
                continue
            self._layers.append(layer)
            if isinstance(layer, nn.Linear):
                up = torch.randn(layer.out_features, RANK, generator=generator)
                down = torch.randn(RANK, layer.in_features, generator=generator) / (RANK * layer.in_features) ** 0.5
                kind = {"dtype": layer.weight.dtype, "device": streams.device}
                self._factors[layer] = (up.to(**kind), down.to(**kind))
            forward = layer.forward
            layer.forward = partial(self._forward, layer, forward)

    def close(self) -> None:
        """Take the patches of `forward` off. Weights stay as they are."""
        for layer in self._layers:
            vars(layer).pop("forward", None)
        self._layers.clear()

    def forget_backups(self) -> None:
        """As if no LoRA had been used yet. Only while none is applied."""
        if any(strength is not None for strength in self._current.values()):
            raise RuntimeError("a LoRA is applied: its backups are the only originals")
        self._kept.clear()

    @property
    def patched(self) -> int:
        """Layers that the LoRA has modules for."""
        return len(self._factors)

    def _forward(self, layer: nn.Module, forward: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
        if self._current.get(layer) != self.strength:
            with torch.no_grad():
                self._change(layer)
            self._current[layer] = self.strength
        return forward(*args)

    def _change(self, layer: nn.Module) -> None:
        kept = self._kept.get(layer)
        if kept is None:
            kept = self._kept[layer] = {name: self._store(parameter) for name, parameter in layer.named_parameters(recurse=False)}
        for name, backup in kept.items():
            self._restore(getattr(layer, name), backup)
        if self.strength is not None and layer in self._factors:
            up, down = self._factors[layer]
            layer.weight.copy_(layer.weight + self.strength * (up @ down))

    def _store(self, parameter: nn.Parameter) -> torch.Tensor:
        backup = self.backups.copy(parameter) if self.backups is not None else None
        if backup is None:
            backup = torch.empty_like(parameter, device="cpu")
            self._move(backup, parameter.data, self._streams.offload_stream)
        if self.backups is not None:
            self.backups.note(parameter, backup)
        return backup

    def _restore(self, parameter: nn.Parameter, backup: torch.Tensor) -> None:
        if self.backups is not None and self.backups.holds(parameter, backup):
            return
        if self._streams.device.type == "cpu":
            self._move(parameter.data, backup, self._streams.onload_stream)
            torch.autograd.graph.increment_version(parameter)  # as torch's own copy would
        else:
            parameter.copy_(backup)
            self.moved_bytes += backup.numel() * backup.element_size()
        if self.backups is not None:
            self.backups.note(parameter, backup)

    def _move(self, destination: torch.Tensor, source: torch.Tensor, stream: object) -> None:
        """Over the link, waiting, as torch's copies between the device and pageable memory do."""
        self.moved_bytes += source.numel() * source.element_size()
        if self._streams.device.type != "cpu":
            destination.copy_(source)
            return
        self._streams.copy(as_bytes(destination), as_bytes(source), stream)
        self._streams.synchronize(self._streams.record(stream))
