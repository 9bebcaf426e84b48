"""Who acts for which module: by identity, and no longer than the module lives."""

from __future__ import annotations

import copy
import gc

from torch import nn

from lib_async_lowvram.unit_hooks import Registry


class Equal(nn.Module):
    """Compares equal to any other: a module's own idea of equality tells nothing of whose hooks these are."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = nn.Module.__hash__


class Actor:
    """Stands for one."""


def test_modules_are_told_apart_by_identity() -> None:
    registry, one, other = Registry(), Equal(), Equal()
    registry[one] = mine = Actor()
    assert one in registry and other not in registry and copy.deepcopy(one) not in registry
    registry[other] = Actor()
    registry.pop(other)
    registry.pop(other)  # nothing happens
    assert registry.of == {id(one): mine}


def test_a_module_that_is_gone_leaves_nothing_behind() -> None:
    registry = Registry()
    for in_a_cycle in (False, True):
        module = nn.Linear(1, 1)
        registry[module] = Actor()
        if in_a_cycle:
            module.__dict__["itself"] = module
        identity = id(module)
        del module
        gc.collect()
        assert identity not in registry.of and len(registry) == 0 and not registry._living


def test_an_actor_put_there_anew_stays() -> None:
    registry, module = Registry(), nn.Linear(1, 1)
    registry[module] = Actor()
    told = registry._living[id(module)]
    registry[module] = later = Actor()
    told.__callback__(told)  # too late, of a module that had this identity before
    assert registry.of == {id(module): later}
    registry.pop(module)
    assert module not in registry and not registry._living
