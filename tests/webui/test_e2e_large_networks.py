"""Large pictures with LoRA and with a refiner in the real WebUI. Set up and run as `test_e2e_lora`.

Stock makes no tiles, so it judges one tile; of several it is asked that a network counts in all of them, is patched as often as in a
whole picture, and leaves nothing behind.
"""

from __future__ import annotations

import pytest
from lora_fixtures import NEEDS_SERVERS
from lora_pair import NETWORKS, job

pytestmark = NEEDS_SERVERS

TITLE = "Large pictures"
LORA = "<lora:e2e-one:1>"
WIDE = {"width": 384, "height": 320}
"""Two by two tiles of 256."""


def tiled(networks: str = "", tile: int = 256, **changes):
    return {**job(networks, **{**WIDE, **changes}), "alwayson_scripts": {TITLE: {"args": ["On", tile, 0, None]}}}


def made(pair, asked):
    """(pictures, write-backs of text encoder and UNet, passes of the UNet)"""
    before = pair.ours.status()["networks"]
    pictures = pair.ours.pictures("txt2img", asked)
    after = pair.ours.status()["networks"]
    written = [after[name]["write_backs"] - before[name]["write_backs"] for name in NETWORKS]
    return pictures, written, after["unet"]["passes"] - before["unet"]["passes"]


@pytest.mark.parametrize("networks", ["", LORA])
def test_one_tile_is_stocks(pair, networks):
    stock = pair.stock.pictures("txt2img", job(networks))
    assert pair.ours.pictures("txt2img", tiled(networks, 512, width=128, height=128)) == stock


def test_a_network_in_every_tile(pair):
    without = made(pair, tiled())[0]
    whole, written_whole, passes_whole = made(pair, job(LORA, **WIDE))
    made(pair, job(**WIDE))
    first, written, passes = made(pair, tiled(LORA))
    again, more, _ = made(pair, tiled(LORA))
    removed = made(pair, tiled())[0]
    print(f"\nwhole {whole}, {written_whole}, {passes_whole} passes; tiled {first}, {written}, then {more}, {passes}, none {without}")
    assert first == again != whole and removed == without != first
    assert written == written_whole and more == [0, 0] and written[1] > 0
    status = pair.ours.status()
    assert status["state"] == "active" and status["placement_faults"] == 0, status["last_error"]


def test_a_refiner_in_the_middle(pair):
    """The model changes within a step; its tiles are made by the other one from there on."""
    other = next(iter(pair.others))
    asked = tiled(steps=6)
    refined = {**asked, "refiner_checkpoint": other, "refiner_switch_at": 0.5}
    first, again = (made(pair, refined)[0] for _ in range(2))
    plain = made(pair, asked)[0]
    print(f"\nrefined {first}, plain {plain}")
    assert first == again != plain
    status = pair.ours.status()
    assert status["state"] == "active" and status["placement_faults"] == 0, status["last_error"]
