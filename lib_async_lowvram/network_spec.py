"""How a network is described to the mover: which modules move as a whole when stock moves them, and what one pass is.

A plain `nn.Module` describes itself: one call of it is a pass. The WebUI's networks need more, because stock `--lowvram`
hooks their parts (`webui/lowvram.py` builds the specs). The references here are strong; the mover keeps weak ones (I7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Region:
    """One module that stock `--lowvram` hooks as a whole.

    Attributes:
        module: everything under it moves together in the learning pass.
        trigger: the module whose call announces that the region is about to run; `module` itself unless given.
        name: for people; what the network's span calls it unless given.
    """

    module: nn.Module
    trigger: nn.Module | None = None
    name: str = ""


@dataclass(frozen=True)
class NetworkSpec:
    """The regions that run as one cycle.

    Attributes:
        regions: in any order. A parameter outside all regions and roots is not managed and stays where it is.
        span: the module one call of which is one pass; None when passes are opened by `AsyncModelMover.running`.
        open_ended: only the start of `span`'s call means something (the text encoder of SD2 announces itself through its
            token embedding): the pass lasts until the next one, or until another network starts.
        roots: modules whose weights outside all regions belong to the network as well; they stay on the device for the
            whole learning pass.
    """

    regions: Sequence[Region]
    span: nn.Module | None
    open_ended: bool = False
    roots: Sequence[nn.Module] = ()

    @classmethod
    def of(cls, module: nn.Module, *, whole: bool) -> NetworkSpec:
        """The spec of a plain module: one call is one pass.

        `whole`: one region, right for every module, at the price of all its weights on the device during the learning
        pass. Otherwise one region per child (looking through containers that are never called), for models that do not
        fit; a parent must not read such a child's weights without calling it.
        """
        if whole:
            return cls([Region(module)], module)
        return cls([Region(child) for child in _callable_children(module)], module, roots=[module])


def _callable_children(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found.extend(_callable_children(child))
        else:
            found.append(child)
    return found
