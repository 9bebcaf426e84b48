"""The built-in LoRA's two functions for backups, patched: the same bytes in the same places, with fewer moves."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from lib_async_lowvram.webui import lora


def make_networks():
    """The part of the built-in extension's module that concerns backups, as its interface is."""
    networks = types.ModuleType(lora.MODULE)
    networks.loaded_networks = []
    networks.network_apply_weights = lambda layer: None
    networks.calls = []

    def store_weights_backup(weight):
        networks.calls.append("store")
        return None if weight is None else weight.to("cpu", copy=True)

    def restore_weights_backup(obj, field, weight):
        networks.calls.append("restore")
        if weight is None:
            setattr(obj, field, None)
        else:
            with torch.no_grad():
                getattr(obj, field).copy_(weight)

    networks.store_weights_backup = store_weights_backup
    networks.restore_weights_backup = restore_weights_backup
    return networks


@pytest.fixture
def networks(monkeypatch):
    made = make_networks()
    monkeypatch.setitem(sys.modules, lora.MODULE, made)
    return made


class Known:
    """Backups that know everything, or nothing."""

    def __init__(self, everything):
        self.everything = everything
        self.noted = []

    def copy(self, parameter):
        return parameter.detach().clone() if self.everything else None

    def note(self, parameter, backup):
        self.noted.append((parameter, backup))

    def holds(self, parameter, backup):
        return self.everything


def test_patched_with_the_integration_and_put_back_with_it(webui, networks, recording):
    stock = make_networks()
    assert networks.store_weights_backup.__name__ == stock.store_weights_backup.__name__
    originals = (networks.store_weights_backup.__wrapped__, networks.restore_weights_backup.__wrapped__)
    recording.integration.close()
    assert (networks.store_weights_backup, networks.restore_weights_backup) == originals


def test_without_a_mover_stock_does_it(webui, networks, recording):
    linear = nn.Linear(2, 2)
    backup = networks.store_weights_backup(linear.weight)
    assert torch.equal(backup, linear.weight)
    networks.restore_weights_backup(linear, "weight", backup)
    assert networks.calls == ["store", "restore"]


@pytest.mark.parametrize("missing", ["store_weights_backup", "network_apply_weights", None])
def test_another_version_is_left_alone(monkeypatch, missing):
    networks = make_networks()
    if missing is None:
        monkeypatch.delitem(sys.modules, lora.MODULE, raising=False)
    else:
        delattr(networks, missing)
        monkeypatch.setitem(sys.modules, lora.MODULE, networks)
    assert list(lora.LoraBackups(lambda: None).patches()) == []


@pytest.mark.parametrize("everything", [True, False])
def test_asked_first(networks, everything):
    known = Known(everything)
    patched = lora.LoraBackups(lambda: known)
    linear = nn.Linear(2, 2)
    backup = patched._on_store(networks.store_weights_backup, linear.weight)
    assert torch.equal(backup, linear.weight)
    assert patched._on_store(networks.store_weights_backup, None) is None
    patched._on_restore(networks.restore_weights_backup, linear, "weight", backup)
    assert networks.calls == (["store"] if everything else ["store", "store", "restore"])
    assert len(known.noted) == (1 if everything else 2)


def test_what_restoring_rounds_is_not_taken_for_equal(networks):
    """A half-precision backup of a weight that is stored in eight bits by now."""
    known = Known(False)
    linear = nn.Linear(2, 2)
    lora.LoraBackups(lambda: known)._on_restore(networks.restore_weights_backup, linear, "weight", linear.weight.detach().half())
    assert known.noted == []


def test_a_bias_that_lora_added_is_taken_away_again(networks):
    linear = nn.Linear(2, 2)
    lora.LoraBackups(lambda: Known(True))._on_restore(networks.restore_weights_backup, linear, "bias", None)
    assert linear.bias is None
