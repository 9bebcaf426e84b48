"""The module tree of one network, looked at without being held.

Problem: other extensions insert and remove modules between passes (adapters, hijacks), so the tree is walked anew at each
pass's start and compared by identity; and references must be weak, or a dropped checkpoint would stay in memory (I7).

Called under the mover's lock.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

from lib_async_lowvram.network_spec import NetworkSpec


@dataclass(frozen=True)
class Tree:
    """One look at the tree. Holds modules strongly: let go of it before returning to the host.

    Attributes:
        modules: every module once, parents before children, in tree order.
        names: id of module -> name for people. parents: id -> parent's id (none for tops).
        region: id -> number of the first region that contains it; absent for those outside all regions.
    """

    modules: list[nn.Module]
    names: dict[int, str]
    parents: dict[int, int]
    region: dict[int, int]


class ModuleTree:
    """Weak references to the tops of a network, and walks from there."""

    def __init__(self, spec: NetworkSpec) -> None:
        self.regions = [weakref.ref(region.module) for region in spec.regions]
        self.region_names = _names(spec)
        self.triggers = [weakref.ref(region.trigger or region.module) for region in spec.regions]
        self.roots = [weakref.ref(module) for module in spec.roots]
        self.span = weakref.ref(spec.span) if spec.span is not None else None

    @property
    def alive(self) -> bool:
        """Whether the modules still exist: a dropped model's networks are forgotten."""
        return any(ref() is not None for ref in self.regions) or any(ref() is not None for ref in self.roots)

    def fingerprint(self) -> tuple[int, ...]:
        """Identities of all modules and their numbers of parameters and buffers, in walking order: equal while nobody
        inserted or removed one."""
        seen: set[int] = set()
        found: list[int] = []
        stack = [module for ref in reversed(self.regions + self.roots) if (module := ref()) is not None]
        while stack:
            module = stack.pop()
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            found.append(id(module))
            found.append(len(module._parameters) << 16 | len(module._buffers))
            if module._modules:
                stack.extend(module._modules.values())
        return tuple(found)

    def scan(self) -> Tree:
        """Walk the tree."""
        tree = Tree([], {}, {}, {})
        for number, ref in enumerate(self.regions):
            if (top := ref()) is not None:
                self._walk(tree, top, self.region_names[number], number)
        for ref in self.roots:
            if (top := ref()) is not None:
                self._walk(tree, top, "", None)
        return tree

    def _walk(self, tree: Tree, top: nn.Module, name: str, region: int | None) -> None:
        stack: list[tuple[nn.Module, str, int | None]] = [(top, name, None)]
        while stack:
            module, name, parent = stack.pop()
            key = id(module)
            if parent is not None:
                tree.parents.setdefault(key, parent)
            if key in tree.names:
                # Under a root, or shared: its first region counts; but a root's walk still teaches parents.
                if region is not None or tree.names[key] != "":
                    continue
            tree.names[key] = name or type(module).__name__
            tree.modules.append(module)
            if region is not None:
                tree.region[key] = region
            for child_name, child in reversed(list(module._modules.items())):
                if child is not None:
                    stack.append((child, f"{name}.{child_name}".lstrip("."), key))
        return None


def _names(spec: NetworkSpec) -> list[str]:
    """Of each region, as the span knows it: "" for the span itself, its number for one that is nowhere in it."""
    inside = {id(module): name for name, module in spec.span.named_modules()} if spec.span is not None else {}
    return [region.name or inside.get(id(region.module), f"[{number}]") for number, region in enumerate(spec.regions)]
