"""The tiled VAE around the VAE's own methods: bands when wished or needed, the network's own forward otherwise, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram.large.settings import AUTOMATIC, OFF, ON, LargePictures
from lib_async_lowvram.large.tiled_vae import EXACT, WHOLE
from lib_async_lowvram.webui import large_vae
from lib_async_lowvram.webui.large_vae import LargeVae, limits_for
from tests.large.measures import psnr
from tests.large.realistic_vae import Autoencoder, calibrated, latents, pictures
from tests.mover.chains import OPEN, simulated

MB = 1 << 20


@pytest.fixture(autouse=True)
def close_devices():
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(scope="module")
def vae() -> Autoencoder:
    return calibrated(8)


def inputs(method: str, rows: int = 24) -> torch.Tensor:
    return latents(rows, 16) if method == "decode" else pictures(8 * rows, 128)


@torch.no_grad()
def called(vae: Autoencoder, method: str, wish: LargePictures, free_bytes: int = 64 * MB, x: torch.Tensor | None = None):
    """(result, the LargeVae) of the VAE's own method."""
    large, streams = LargeVae(), simulated(capacity_bytes=free_bytes)
    with large.around(vae, method, wish, streams, None):
        got = getattr(vae, method)(inputs(method) if x is None else x)
    assert not {"forward"} & (vars(vae.decoder).keys() | vars(vae.encoder).keys())
    return got, large


methods = pytest.mark.parametrize("method", ["decode", "encode"])


@methods
def test_off_nothing_is_touched(vae: Autoencoder, method: str) -> None:
    large = LargeVae()
    with large.around(vae, method, LargePictures(OFF), simulated(), None), torch.no_grad():
        assert not {"forward"} & (vars(vae.decoder).keys() | vars(vae.encoder).keys())
        getattr(vae, method)(inputs(method))
    assert large.report is None


@methods
def test_automatic_with_room_is_the_networks_own_bits(vae: Autoencoder, method: str) -> None:
    with torch.no_grad():
        expected = getattr(vae, method)(inputs(method))
    got, large = called(vae, method, LargePictures(AUTOMATIC))
    assert torch.equal(got, expected) and large.report.mode == WHOLE


@methods
def test_automatic_with_little_memory(vae: Autoencoder, method: str) -> None:
    with torch.no_grad():
        expected = getattr(vae, method)(inputs(method))
    got, large = called(vae, method, LargePictures(AUTOMATIC), 2 * MB)
    assert psnr(got, expected) > 100 and large.report.mode == EXACT and large.report.host_bytes > 0
    assert large.report.device_bytes <= 2 * MB


@methods
def test_above_a_tile(vae: Autoencoder, method: str) -> None:
    with torch.no_grad():
        expected = getattr(vae, method)(inputs(method))
    got, large = called(vae, method, LargePictures(AUTOMATIC, tile=64))
    assert psnr(got, expected) > 100 and large.report.mode == EXACT and large.report.rows[1] == 32
    _, large = called(vae, method, LargePictures(AUTOMATIC, tile=192))
    assert large.report.mode == WHOLE


@methods
def test_a_replaced_forward_is_left_alone(vae: Autoencoder, method: str) -> None:
    network = getattr(vae, large_vae.PARTS[method])

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return type(network).forward(network, x)

    network.forward = theirs
    large = LargeVae()
    with large.around(vae, method, LargePictures(ON), simulated(), None), torch.no_grad():
        getattr(vae, method)(inputs(method))
        assert vars(network)["forward"] is theirs
    assert large.report is None
    del network.forward


def test_what_cannot_be_tiled_is_computed_as_ever_and_said_once(vae: Autoencoder, caplog: pytest.LogCaptureFixture) -> None:
    z = inputs("decode")
    large, streams = LargeVae(), simulated()
    expected = vae.decode(z)
    for _ in range(2):
        with large.around(vae, "decode", LargePictures(ON, tile=64), streams, None), torch.enable_grad():
            assert torch.equal(vae.decode(z), expected)
    assert large.refused == "gradients are on" and large.report is None
    assert sum("gradients are on" in record.getMessage() for record in caplog.records) <= 1


def test_an_error_leaves_nothing_behind(vae: Autoencoder) -> None:
    with pytest.raises(RuntimeError):
        called(vae, "decode", LargePictures(ON, tile=64), x=torch.zeros(1, 5, 24, 16))
    assert "forward" not in vars(vae.decoder)


def test_hooks_of_the_network_itself_see_one_call(vae: Autoencoder) -> None:
    calls = []
    handle = vae.decoder.register_forward_hook(lambda module, args, output: calls.append(tuple(output.shape)))
    for wish in (LargePictures(AUTOMATIC), LargePictures(ON, tile=64)):
        called(vae, "decode", wish)
    handle.remove()
    assert calls == [(1, 3, 192, 128)] * 2


def test_a_band_has_a_tiles_area() -> None:
    wish = LargePictures(ON, tile=1024)
    assert limits_for(wish, (1, 4, 256, 256), "decode", 0).most_rows == 512
    assert limits_for(wish, (1, 3, 1024, 8192), "encode", 0).most_rows == 128
    assert limits_for(wish, (1, 4, 128, 128), "decode", 0).most_rows is None
    assert limits_for(LargePictures(AUTOMATIC), (1, 4, 512, 512), "decode", 0).most_rows is None
    assert limits_for(LargePictures(ON), (1, 4, 80, 64), "decode", 0).most_rows == 320
    assert limits_for(LargePictures(ON), (1, 4, 64, 64), "decode", 1000).device_bytes == 900
