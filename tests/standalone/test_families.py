"""Which family a checkpoint is of, from its names; and that what is not known says what it seems to be."""

from __future__ import annotations

import pytest

from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.families import FAMILIES, SD15, SDXL, UNET, Family, family_of
from tests.standalone.make_checkpoint import shapes


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_known_ones(family: Family) -> None:
    assert family_of(shapes(family)) is family


@pytest.mark.parametrize(("family", "million"), [(SD15, 859.52), (SDXL, 2567.46)], ids=["SD1.5", "SDXL"])
def test_their_unets_have_the_published_numbers_of_parameters(family: Family, million: float) -> None:
    total = 0
    for name, shape in shapes(family).items():
        if name.startswith(UNET):
            count = 1
            for extent in shape:
                count *= extent
            total += count
    assert round(total / 1e6, 2) == million


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "no UNet"),
        (["lora_unet_x"], "a LoRA"),
        ([UNET + "x"], "no text encoder"),
        ([UNET + "x", "cond_stage_model.model.transformer.y"], "SD2"),
        ([UNET + "x", "conditioner.embedders.0.model.y"], "refiner"),
    ],
)
def test_others(names: list[str], says: str) -> None:
    with pytest.raises(CannotMake, match=says):
        family_of(names)
