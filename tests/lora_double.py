"""The WebUI's built-in LoRA, by behaviour: how it writes weights, on any module tree.

Problem: LoRA is the one everybody uses, and it writes weights where no mover can see it coming: class-wide forward patches
run behind every hook, inside the leaf's own forward, copy a backup to the host, restore from it through `copy_`, write
through the Parameter in place, set a *new* bias Parameter and later None in its place, and reach into `out_proj`, which never
fires. What it has written it remembers on the module, so a change that gets lost is never made again.

A twin of the managed tree runs under the same patches; each module keeps its own books. The patches end with the `with`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PATCHED = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)


@dataclass(frozen=True)
class Network:
    """One file at one strength. `layers`: which layer names it has weights for; `biased`: which of them add to the bias."""

    name: str
    strength: float = 1.0
    layers: Callable[[str], bool] = lambda name: True
    biased: Callable[[str], bool] = lambda name: False

    def updown(self, layer: str, part: str, weight: torch.Tensor) -> torch.Tensor:
        """What is added to that weight: seeded by the file, the layer and the part, and nothing else."""
        seed = zlib.crc32(f"{self.name} {layer} {part}".encode())
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        return (0.2 * self.strength * drawn).to(weight.device, torch.float32 if weight.element_size() == 1 else weight.dtype)


class LoraDouble:
    """Patches on entry, undoes on exit. `loaded`: the networks wanted now. `functional`: add to outputs, write nothing.

    `objects_to_added_bias`: 1.10.1 takes a bias that it added itself, to a layer that had none, for one it has no backup of,
    and raises in the very next pass. Others that write weights this way do not.
    """

    def __init__(self, objects_to_added_bias: bool = False) -> None:
        self.objects_to_added_bias = objects_to_added_bias
        self.loaded: tuple[Network, ...] = ()
        self.functional = False
        self.store, self.restore = store, restore  # whoever patches the extension puts his own here
        self.applied = 0  # how often some module's weights were written
        self.extra_network_lora = SimpleNamespace(errors={})  # errors by file, counted and otherwise passed over
        self._originals: list[tuple[type, str, Any]] = []

    def __enter__(self) -> LoraDouble:
        for kind in PATCHED:
            self._patch(kind, "forward", self._forward(kind, kind.forward))
            self._patch(kind, "_load_from_state_dict", self._load(kind._load_from_state_dict))
        return self

    def __exit__(self, *_: object) -> None:
        for kind, name, original in reversed(self._originals):
            if original is None:
                delattr(kind, name)
            else:
                setattr(kind, name, original)

    def _patch(self, kind: type, name: str, replacement: Callable) -> None:
        self._originals.append((kind, name, kind.__dict__.get(name)))
        setattr(kind, name, replacement)

    def want(self, *networks: Network) -> None:
        """From the next forward on; none means removal."""
        self.loaded = networks

    @staticmethod
    def name_layers(*models: nn.Module) -> None:
        """Layers are known by their place in the model."""
        for model in models:
            for name, module in model.named_modules():
                if isinstance(module, PATCHED):
                    module.network_layer_name = name

    # -- what the patched classes do -----------------------------------------------------------------------------------
    def _forward(self, kind: type, original: Callable) -> Callable:
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.functional and kind is not nn.MultiheadAttention:
                return self._beside(module, original, *args)
            with torch.no_grad():
                self._apply(module)
            return original(module, *args, **kwargs)

        return forward

    def _load(self, original: Callable) -> Callable:
        def load(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._forget(module)
            return original(module, *args, **kwargs)

        return load

    @staticmethod
    def _forget(module: nn.Module) -> None:
        module.network_current_names = ()
        module.network_weights_backup = module.network_bias_backup = None

    def _apply(self, module: nn.Module) -> None:
        layer = getattr(module, "network_layer_name", None)
        if layer is None:
            return
        wanted = tuple((network.name, network.strength) for network in self.loaded)
        present = getattr(module, "network_current_names", ())
        if wanted and getattr(module, "network_weights_backup", None) is None:
            if present:
                raise RuntimeError(f"{layer}: weights are changed and there is no backup of them")
            module.network_weights_backup = [self.store(getattr(owner, field)) for owner, field in _weights(module)]
        if wanted and getattr(module, "network_bias_backup", None) is None:
            held = _bias_owner(module).bias
            if not present:
                module.network_bias_backup = None if held is None else self.store(held)
            elif held is not None and self.objects_to_added_bias:
                raise RuntimeError(f"{layer}: the bias is changed and there is no backup of it")
        if present == wanted:
            return
        self._restore(module)
        for network in self.loaded:
            if network.layers(layer):
                self.applied += 1
                try:
                    self._add(module, network, layer)
                except RuntimeError:
                    self.extra_network_lora.errors[network.name] = self.extra_network_lora.errors.get(network.name, 0) + 1
        module.network_current_names = wanted

    def _restore(self, module: nn.Module) -> None:
        backup, bias = getattr(module, "network_weights_backup", None), getattr(module, "network_bias_backup", None)
        if backup is None and bias is None:
            return
        for (owner, field), kept in zip(_weights(module), backup or (), strict=False):
            self.restore(owner, field, kept)
        self.restore(_bias_owner(module), "bias", bias)

    def _add(self, module: nn.Module, network: Network, layer: str) -> None:
        owner = _bias_owner(module)
        if isinstance(module, nn.MultiheadAttention):
            parts = zip("qkv", module.in_proj_weight.chunk(3, 0), strict=True)
            module.in_proj_weight += torch.vstack([network.updown(layer, part, weight) for part, weight in parts])
            module.out_proj.weight += network.updown(layer, "out", module.out_proj.weight)
        else:
            whole = getattr(module, "fp16_weight", None)
            weight = module.weight if whole is None else whole.clone().to(module.weight.device)
            updown = network.updown(layer, "weight", weight)
            module.weight.copy_((weight.to(updown.dtype) + updown).to(module.weight.dtype))
        if network.biased(layer):
            size = module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.weight.shape[0]
            extra = network.updown(layer, "bias", torch.empty(size, device=module_device(module)))
            if owner.bias is None:
                owner.bias = nn.Parameter(extra)
            elif owner is not module:
                owner.bias += extra
            else:
                whole = getattr(module, "fp16_bias", None)
                bias = owner.bias if whole is None else whole.clone().to(owner.bias.device)
                owner.bias.copy_((bias + extra).to(owner.bias.dtype))

    def _beside(self, module: nn.Module, original: Callable, x: torch.Tensor) -> torch.Tensor:
        """The functional way: nothing is written, but what was written before is taken back."""
        if not self.loaded:
            return original(module, x)
        with torch.no_grad():
            self._restore(module)
            self._forget(module)
        y, layer = original(module, x), getattr(module, "network_layer_name", "")
        for network in self.loaded:
            if network.layers(layer) and isinstance(module, nn.Linear):
                y = y + F.linear(x, network.updown(layer, "weight", module.weight))
        return y


def _weights(module: nn.Module) -> Sequence[tuple[nn.Module, str]]:
    if isinstance(module, nn.MultiheadAttention):
        return (module, "in_proj_weight"), (module.out_proj, "weight")
    return ((module, "weight"),)


def _bias_owner(module: nn.Module) -> nn.Module:
    return module.out_proj if isinstance(module, nn.MultiheadAttention) else module


def store(tensor: torch.Tensor) -> torch.Tensor:
    """How LoRA takes a backup."""
    return tensor.to("cpu", copy=True)


def restore(owner: nn.Module, field: str, backup: torch.Tensor | None) -> None:
    """How LoRA goes back to one."""
    if backup is None:
        setattr(owner, field, None)
    else:
        getattr(owner, field).copy_(backup)


def module_device(module: nn.Module) -> torch.device:
    """Where its weights are."""
    owner, field = _weights(module)[0]
    return getattr(owner, field).device
