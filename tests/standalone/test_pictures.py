"""Whole pictures from small checkpoints: what diffusers' own pipelines make of them, tiled or not, from a file that nobody loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.families import Family
from lib_async_lowvram.standalone.making import Made, make
from lib_async_lowvram.standalone.request import Request
from tests.standalone.reference import picture
from tests.standalone.tiny import TINY_SD15, TINY_SDXL, tiny_file

MB = 1 << 20


@pytest.fixture(scope="module", params=[TINY_SD15, TINY_SDXL], ids=lambda family: family.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Family]:
    return tiny_file(tmp_path_factory.mktemp("model"), request.param), request.param


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_file(tmp_path_factory.mktemp("sd15"), TINY_SD15)


def asked(path: Path, **more) -> Request:
    return replace(Request(path, "a lighthouse at dusk", 128, 192, 3, 800 * MB, negative_prompt="fog", seed=5), **more)


def made(request: Request, family: Family) -> Made:
    return make(request, lambda line: None, lambda stage, share: None, family)


def judged(got: Made, expected: tuple[torch.Tensor, torch.Tensor], closeness: float = 1e-4) -> None:
    latent, image = expected
    assert torch.isfinite(latent).all() and latent.std() > 0.1
    assert (got.latent - latent).abs().max() < closeness * latent.abs().max()
    assert got.picture.shape == image.shape and (got.picture.int() - image.int()).abs().max() <= 1
    assert image.float().std() > 1


@pytest.mark.parametrize("more", [{}, {"cfg": 1.0}, {"sampler": "DDIM"}, {"sampler": "Euler a"}, {"negative_prompt": ""}], ids=str)
def test_what_diffusers_makes(model: tuple[Path, Family], more: dict) -> None:
    path, family = model
    request = asked(path, **more)
    found = made(request, family)
    assert found.tiling.startswith("1 tile of 128 x 192")
    judged(found, picture(request, family))


def test_the_same_from_weights_that_never_fit(model: tuple[Path, Family]) -> None:
    """A budget of two of the largest weights and a little: everything streams, in every call."""
    path, family = model
    plenty = made(asked(path), family)
    scarce = made(asked(path, memory_bytes=140 * MB), family)
    assert torch.equal(plenty.picture, scarce.picture) and torch.equal(plenty.latent, scarce.latent)
    assert plenty.read_bytes > 0


def test_on_the_simulated_device(sd15: Path) -> None:
    """Where memory that holds nothing is NaN, and weights travel over a link."""
    assert torch.equal(made(asked(sd15, device="simulated"), TINY_SD15).picture, made(asked(sd15), TINY_SD15).picture)


def test_tiles(sd15: Path) -> None:
    """Another picture than the whole, the same for the same seed, and no seams in a file of its own size."""
    request = asked(sd15, width=512, height=256, tile=256)
    found = made(request, TINY_SD15)
    assert found.tiling.startswith("3 tiles of 256 x 256")
    assert found.picture.shape == (256, 512, 3)
    assert torch.equal(found.picture, made(request, TINY_SD15).picture)
    assert not torch.equal(found.latent, made(replace(request, seed=6), TINY_SD15).latent)


def test_a_guide(sd15: Path, tmp_path: Path) -> None:
    from lib_async_lowvram.standalone.pictures import save

    guide = tmp_path / "guide.png"
    save(torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)), guide, "")
    request = asked(sd15, image=guide, steps=4)
    for more in ({"strength": 0.5}, {"strength": 1.0, "sampler": "DDIM"}, {"strength": 0.75, "sampler": "Heun"}):
        judged(made(replace(request, **more), TINY_SD15), picture(replace(request, **more), TINY_SD15))
    near, far = (made(replace(request, strength=strength), TINY_SD15) for strength in (0.25, 1.0))
    alone = made(asked(sd15, steps=4), TINY_SD15)
    assert not torch.equal(near.latent, far.latent) and not torch.equal(far.latent, alone.latent)
    with pytest.raises(CannotMake, match="leaves no step"):
        made(replace(request, strength=0.1), TINY_SD15)
    with pytest.raises(CannotMake, match="cannot read"):
        made(replace(request, image=tmp_path / "none.png"), TINY_SD15)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_other_types_in_the_file(tmp_path: Path, stored: torch.dtype) -> None:
    path = tiny_file(tmp_path, TINY_SD15, stored)
    judged(made(asked(path), TINY_SD15), picture(asked(path), TINY_SD15))


def test_a_file_of_several_types(sd15: Path, tmp_path: Path) -> None:
    """A VAE in float32 beside a UNet in half precision: converted, too, where the UNet's weights need no conversion."""
    from safetensors.torch import load_file, save_file

    mixed = tmp_path / "mixed.safetensors"
    save_file({k: v.float() if k.startswith("first_stage_model.") else v for k, v in load_file(str(sd15)).items()}, str(mixed))
    request = asked(sd15, width=64, height=64, precision="float16")
    assert torch.equal(made(request, TINY_SD15).picture, made(replace(request, checkpoint=mixed), TINY_SD15).picture)


def test_another_precision(sd15: Path) -> None:
    exact, rough = made(asked(sd15), TINY_SD15), made(asked(sd15, precision="bfloat16"), TINY_SD15)
    off = (exact.latent - rough.latent).abs().max() / exact.latent.abs().max()
    assert 0 < off < 0.1
    with pytest.raises(CannotMake, match="no precision"):
        made(asked(sd15, precision="int3"), TINY_SD15)


def test_too_little_memory(sd15: Path) -> None:
    with pytest.raises(CannotMake, match="too little for this model: .* MB at least"):
        made(asked(sd15, memory_bytes=20 * MB), TINY_SD15)


def test_a_checkpoint_of_another_shape(sd15: Path) -> None:
    with pytest.raises(CannotMake, match="where a SD1.5 UNet has"):
        made(asked(sd15), replace(TINY_SD15, unet={**TINY_SD15.unet, "cross_attention_dim": 48}))
