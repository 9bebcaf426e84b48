"""Large pictures in the real WebUI: off and one tile are stock's pictures; tiles, regions, hires fix, the API and a picture's own text.

Set up and run as `test_e2e`. Under a quarter of the UNet, so that weights stream: with tiles they travel once per step as without.
"""

# ruff: noqa: F811 - the fixtures are imported

from __future__ import annotations

import json

import pytest
from pair_fixtures import BIG, JOB, img2img, inpainting, needs_servers, pair, servers  # noqa: F401

pytestmark = needs_servers

TITLE = "Large pictures"
WIDE = {**JOB, "width": 384, "height": 320}
"""Two by two tiles of 256, and a picture that stock makes whole."""
TREE = {"x": 0.0, "y": 0.0, "width": 0.5, "height": 1.0, "prompt": "a red tree", "negative": "blue", "weight": 1.0}


def asking(job, *args, **changes):
    return {**job, **changes, "alwayson_scripts": {TITLE: {"args": list(args)}}}


def made(server, job, kind="txt2img"):
    """(hashes, a picture's own text, bytes streamed for it)"""
    from webui_client import hash_of

    before = server.status()["networks"]["unet"]["streamed_bytes"]
    answer = server.post(f"/sdapi/v1/{kind}", job)
    streamed = server.status()["networks"]["unet"]["streamed_bytes"] - before
    return [hash_of(picture) for picture in answer["images"]], json.loads(answer["info"])["infotexts"][0], streamed


def same(pair, job, *args):
    """Ours with the script, stock, which does not know it, without."""
    before = pair.ours.status()
    got = pair.ours.pictures("txt2img", asking(job, *args))
    after = pair.ours.status()
    pair.judge(f"large pictures {args}", got, pair.stock.pictures("txt2img", job), before, after)


@pytest.mark.parametrize("args", [(), ("Off", 256, 0, None), ("On", 256, 0, None), ("Automatic", 512, 0, None)])
def test_off_and_one_tile_are_stocks(pair, args):
    same(pair, JOB, *args)


def test_off_after_on(pair):
    pair.ours.pictures("txt2img", asking(WIDE, "On", 256, 0, None))
    pair.same("off again", WIDE)
    pair.check_idle()
    assert pair.ours.status()["large"] is None


def test_tiles(pair):
    """The same every time; another picture than whole; weights travel as often."""
    for _ in range(2):
        whole, _, streamed = made(pair.ours, WIDE)
    tiled = [made(pair.ours, asking(WIDE, "On", 256, 0, None)) for _ in range(3)]
    print(f"\nwhole {whole} {streamed} bytes; 4 tiles {[each[0] for each in tiled]} {[each[2] for each in tiled]} bytes")
    assert tiled[0][0] == tiled[1][0] == tiled[2][0] != whole
    assert "Large pictures: On, Large tile: 256" in tiled[0][1]
    assert tiled[2][2] <= 1.02 * streamed
    pair.check_idle()


def test_a_pictures_own_text_makes_it_again(pair):
    first, text, _ = made(pair.ours, asking(WIDE, "On", 256, 64, [TREE]))
    again, more, _ = made(pair.ours, {"infotext": text, "save_images": False})
    assert (again, more) == (first, text)
    without, _, _ = made(pair.ours, asking(WIDE, "On", 256, 64))
    assert without != first


@pytest.mark.parametrize("sampler", ["DPM++ 2M", "DDIM", "UniPC"])
def test_samplers(pair, sampler):
    job = {**WIDE, "sampler_name": sampler, "steps": 4}  # UniPC has an order of three
    tiled = [made(pair.ours, asking(job, "On", 256, 0, None))[0] for _ in range(2)]
    whole = made(pair.ours, job)[0]
    assert tiled[0] == tiled[1] != whole


def test_hires_fix(pair):
    """Its first pass is small and whole, its second tiled."""
    hires = {**JOB, "width": 256, "height": 192, "enable_hr": True, "hr_scale": 2, "denoising_strength": 0.6, "hr_upscaler": "Latent"}
    tiled = [made(pair.ours, asking(hires, "On", 256, 0, None))[0] for _ in range(2)]
    assert tiled[0] == tiled[1] != made(pair.ours, hires)[0]


@pytest.mark.parametrize("kind", ["img2img", "inpainting"])
def test_from_a_picture(pair, kind):
    job = {**(img2img if kind == "img2img" else inpainting)(), "width": 384, "height": 320}
    tiled = [made(pair.ours, asking(job, "On", 256, 0, None), "img2img")[0] for _ in range(2)]
    assert tiled[0] == tiled[1] != made(pair.ours, job, "img2img")[0]


def test_a_batch(pair):
    both = made(pair.ours, asking(WIDE, "On", 256, 0, None, batch_size=2))[0]
    assert len(set(both)) == 2


def test_what_cannot_be_read_is_left_out(pair):
    same(pair, BIG, "On", 256, 0, [{"x": 0}])
