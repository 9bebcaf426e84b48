"""What the tiled VAE's memory formulas say, against what is counted while it runs."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_async_lowvram.large.space import Space
from lib_async_lowvram.large.tiled_vae import ESTIMATED, EXACT, RECOMPUTED, Limits, run
from lib_async_lowvram.large.vae_memory import beyond_memory, shares, stored_bytes, whole_bytes
from lib_async_lowvram.large.vae_steps import steps_of
from tests.large.realistic_vae import Autoencoder, Decoder, Encoder, calibrated, latents, pictures

MB = 1 << 20


class Living(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while any tensor over them lives; not those of spilled activations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now = self.most = 0
        self._holders: dict[int, int] = {}  # address of a storage -> living tensors over it
        self._spilled: set[int] = set()
        block = Space._block

        def spilled(space: Space, nbytes: int) -> torch.Tensor:
            most, made = self.most, block(space, nbytes)
            key = made.untyped_storage().data_ptr()
            if key not in self._spilled:
                self._spilled.add(key)
                self.now, self.most = self.now - nbytes, most
            return made

        monkeypatch.setattr(Space, "_block", spilled)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(arg) for arg in args}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, torch.Tensor) or id(tensor) in given or not tensor.untyped_storage().nbytes():
                continue
            key, nbytes = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
            new = key not in self._holders and not any(_over(arg, key) for arg in args)
            if new:
                self.now += nbytes
                self.most = max(self.most, self.now)
            if new or key in self._holders:
                self._holders[key] = self._holders.get(key, 0) + 1
                weakref.finalize(tensor, self._gone, key, nbytes)
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            if key in self._spilled:
                self._spilled.discard(key)
            else:
                self.now -= nbytes


def _over(value: Any, key: int) -> bool:
    """Whether `value` is a tensor over that storage: then the storage was there before."""
    return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == key


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return calibrated(8)


def with_sd_width(kind: type) -> torch.nn.Module:
    with torch.device("meta"):
        return kind(128)


def test_sd15_at_2048() -> None:
    """By hand: 256 channels of 2048 x 2048 in float16 are 2 GB. The first block at that size stores one of them and two halves of it."""
    steps = steps_of(with_sd_width(Decoder))
    by_name = {step.name: step for step in steps}
    gigabyte = 1 << 30
    assert stored_bytes(by_name["up.0.block.0"], 256, 256, 2) == 4 * gigabyte
    assert stored_bytes(by_name["up.0.block.1"], 256, 256, 2) == 3 * gigabyte
    assert stored_bytes(by_name["up.1.upsample"], 256, 256, 2) == 2.5 * gigabyte
    assert whole_bytes(steps, 256, 256, 2, attention=False) == 1.5 * 8 * gigabyte
    assert max(stored_bytes(step, 256, 256, 2) for step in steps) == 4 * gigabyte


def test_where_activations_are_kept() -> None:
    decoder, encoder = steps_of(with_sd_width(Decoder)), steps_of(with_sd_width(Encoder))
    device = 600 * MB
    assert beyond_memory(decoder, 256, 256, 2, device, 8 << 30) is None
    assert beyond_memory(encoder, 2048, 2048, 2, device, 8 << 30) is None
    short = beyond_memory(decoder, 256, 256, 2, device, 2 << 30)
    assert short.stop == len(decoder) and decoder[short.start].name == "up.1.upsample"
    short = beyond_memory(encoder, 2048, 2048, 2, device, 2 << 30)
    assert short.start == 0 and encoder[short.stop - 1].name == "down.0.block.1"
    assert beyond_memory(decoder, 64, 64, 2, device, 0) is None


def test_shares() -> None:
    assert shares(2 * MB) == (MB, MB)
    assert shares(600 * MB) == (344 * MB, 256 * MB)
    assert shares(0) == (0, 0)


@pytest.mark.parametrize("height", [1, 7, 100])
def test_rows_of_a_band(height: int) -> None:
    space = Space(torch.device("cpu"), 0, 1500, 0)
    assert space.rows(0, 1, height) == height
    assert space.rows(0, 10_000, height) == 1
    assert space.rows(900, 10, height) == min(height, 10)
    assert space.rows(0, 1, height) * 1 <= 1000
    assert Space(torch.device("cpu"), 0, 1500, 0, most_rows=3).rows(0, 1, 7) == 3


@pytest.mark.parametrize("what", ["decode", "encode"])
@torch.no_grad()
def test_what_lives_on_the_device_is_bounded(vae: Autoencoder, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device memory by count of every tensor that any operation makes, against the limit; and the untiled call against its formula."""
    network, x = (vae.decoder, latents(40, 32)) if what == "decode" else (vae.encoder, pictures(320, 256))
    picture_bytes = 320 * 256 * 3 * 4
    for megabytes in (2, 4):
        with Living(monkeypatch) as living:
            _, report = run(network, x, Limits(megabytes * MB, 1 << 40))
        assert report.mode == EXACT and report.spilled_bytes > 0
        assert living.most <= megabytes * MB + 2 * picture_bytes  # what comes out is the caller's
        assert report.device_bytes <= megabytes * MB
    with Living(monkeypatch) as living:
        network(x)
    said = whole_bytes(steps_of(network), *x.shape[2:], 4)
    assert living.most <= said + picture_bytes
    assert said <= 4 * living.most


@pytest.mark.parametrize("estimate", [True, False])
@torch.no_grad()
def test_host_memory_is_bounded(vae: Autoencoder, estimate: bool) -> None:
    for network, x in ((vae.encoder, pictures(128, 128)),):
        for kilobytes in (200, 500):
            _, report = run(network, x, Limits(2 * MB, kilobytes << 10, estimate=estimate))
            assert report.mode == (ESTIMATED if estimate else RECOMPUTED) and report.host_bytes <= kilobytes << 10
