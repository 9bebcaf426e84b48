"""Tiled denoising at its seam: all ways to a model's call, what its rows are for, what is left behind, what is not tiled."""

from __future__ import annotations

import importlib
import logging

import latent_models
import pytest
import torch
from latent_models import Processing, sample

from lib_async_lowvram.large.memory import group, kept
from lib_async_lowvram.large.pieces import pieces
from lib_async_lowvram.large.settings import LargePictures, read
from lib_async_lowvram.webui.large_denoise import LargeDenoise

PLENTY = 1 << 40


def settings(tile: int = 64, overlap: int = 16, regions=None, mode: str = "On") -> LargePictures:
    """Smaller tiles than the user may ask for: the pictures are as small."""
    return LargePictures(read(mode)[0].mode, tile, overlap, read(mode, regions=regions)[0].regions)


@pytest.fixture
def host(webui):
    """`host.load(kind)`; `host.large`, with all the memory it wants; `host.made(p, settings)`: a picture in tiles."""
    host = webui
    host.denoisers = importlib.import_module("modules.sd_samplers_cfg_denoiser")
    host.large = LargeDenoise(lambda model: host.room)
    host.room = PLENTY
    host.untouched = (host.denoisers.CFGDenoiser.forward, host.sd_samplers_common.apply_refiner)

    def load(kind="sd1", **more):
        host.model = latent_models.make(kind, **more)
        host.model.lowvram = False
        host.sd_models.model_data.set_sd_model(host.model)
        return host.model

    def made(p, chosen, **more):
        host.large.begin(p, chosen)
        try:
            picture = sample(p, **more)
            host.status = host.large.status()
            return picture
        finally:
            host.large.end()

    host.load, host.made = load, made
    yield host
    assert (host.denoisers.CFGDenoiser.forward, host.sd_samplers_common.apply_refiner) == host.untouched
    for model in host.sd_models.model_data.loaded_sd_models:
        assert "apply_model" not in vars(model)
        assert not any("forward" in vars(module) for module in model.modules())


def by_hand(model, p, chosen, height=16, width=24):
    """The same picture where each tile is a call of its own and the mean is taken in float64, in `apply_model` itself."""
    stock = model.apply_model

    def tiled(x, t, cond):
        total = torch.zeros(x.shape, dtype=torch.float64)
        weights = torch.zeros(x.shape[-2:], dtype=torch.float64)
        for piece in pieces(*x.shape[-2:], (chosen.tile // 8,) * 2, chosen.overlap // 8):
            rows, columns = piece.tile.rows, piece.tile.columns
            cut = {
                key: [each[..., rows, columns] if each.dim() == 4 and each.shape[-1] > 1 else each for each in value]
                if isinstance(value, list) else value
                for key, value in cond.items()
            }  # fmt: skip
            total[..., rows, columns] += stock(x[..., rows, columns], t, cut).double() * piece.weights.double()
            weights[rows, columns] += piece.weights.double()
        return (total / weights).to(x.dtype)

    model.apply_model = tiled
    try:
        return sample(p, height, width)
    finally:
        del model.apply_model


@pytest.mark.parametrize("together", [True, False], ids=["cfg batched", "cfg apart"])
@pytest.mark.parametrize(("kind", "inpainting"), [("sd1", False), ("sd1", True), ("sd2", False), ("sdxl", False)])
def test_every_tile_is_computed_as_a_picture_of_its_own(host, kind, inpainting, together):
    model = host.load(kind, inpainting=inpainting)
    host.data["batch_cond_uncond"] = together
    chosen = settings()
    p = Processing(["a cat AND a dog", "a cat"], "blurred, with many fingers, and much more that nobody wants to see")
    got = host.made(p, chosen)
    expected = by_hand(model, p, chosen)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (got - sample(p)).abs().max() > 1e-2 * expected.abs().max(), "tiles make a difference"
    assert not host.status["refused"] and not p.comments
    assert all(size["tiles"] == 12 for size in host.status["sizes"])


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_one_tile_and_off_are_the_host_s_own_picture(host, kind):
    host.load(kind)
    p = Processing("a cat")
    stock = sample(p)
    assert torch.equal(host.made(p, settings(tile=256)), stock)
    assert torch.equal(host.made(p, settings(mode="Automatic", tile=None)), stock)
    host.large.begin(p, LargePictures())
    assert host.denoisers.CFGDenoiser.forward is host.untouched[0]
    host.large.begin(Processing("another"), settings())
    assert torch.equal(sample(p), stock)  # not its job
    host.large.end()


def test_memory_decides_how_many_go_together(host):
    model = host.load()
    p, chosen = Processing("a cat"), settings()
    need = kept(model.model.diffusion_model, 4)
    whole = host.made(p, chosen)
    calls = [host.status["sizes"][0]["calls"]]
    assert (host.status["sizes"][0]["at_once"], host.status["sizes"][0]["chunks"]) == (12, 1)
    for room in (group(need, 4, 2, 8, 8, 0).needed_bytes + 8 * need.held_bytes(8, 8), 1):
        host.room = room
        assert (host.made(p, chosen) - whole).abs().max() < 1e-4 * whole.abs().max()
        size = host.status["sizes"][0]
        assert size["chunks"] > 1
        calls.append(size["calls"])
    assert calls[0] == 3 and calls[0] < calls[1] < calls[2] == 36


def test_automatic_leaves_alone_what_fits(host):
    host.load()
    p = Processing("a cat")
    stock = sample(p, 40, 40)
    assert torch.equal(host.made(p, settings(mode="Automatic", tile=None, overlap=None), height=40, width=40), stock)
    host.room = 1
    assert not torch.equal(host.made(p, settings(mode="Automatic", tile=None, overlap=None), height=40, width=40), stock)
    assert host.status["sizes"][0]["tiles"] == 4


def test_hires_fix_tiles_its_second_pass(host):
    host.load()
    p = Processing("a cat", hr_sampler_name=None, hr_second_pass_steps=0, hr_upscale_to_x=384, hr_upscale_to_y=256)
    p.enable_hr = True
    stock = sample(p)
    assert torch.equal(host.made(p, settings()), stock)
    p.is_hr_pass = True
    assert not torch.equal(host.made(p, settings()), stock)
    assert host.status["sizes"][0]["tiles"] == 12


def test_a_refiner_s_model_is_followed(host):
    first = host.load()
    second = latent_models.make("sd1", seed=7)
    second.lowvram = False
    host.sd_models.model_data.loaded_sd_models.append(second)
    host.sd_models.send_model_to_device = lambda model: None
    host.sd_models.send_model_to_cpu = lambda model: None
    seen = []
    for model in (first, second):
        unet = model.model.diffusion_model
        unet.register_forward_pre_hook(lambda module, args, model=model: seen.append((model is second, len(args[0]))))
    p = Processing("a cat", refiner=second, refiner_switch_at=0.5)
    regions = [{"x": 0, "y": 0, "width": 0.5, "height": 1, "prompt": "a fox"}]
    host.made(p, settings(regions=regions))
    rows = {number for _, number in seen}
    assert [refined for refined, _ in seen] == [False] * 2 + [True] and len(rows) == 1 and rows.pop() > 16
    assert first.encoded.count("a fox") == second.encoded.count("a fox") == 1


def contexts(host):
    """Of every call of the UNet, from now on."""
    seen = []
    host.model.model.diffusion_model.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    return seen


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_regions_have_prompts_of_their_own(host, kind, together):
    model = host.load(kind)
    host.data["batch_cond_uncond"] = together
    left = {"x": 0, "y": 0, "width": 0.5, "height": 1, "prompt": "a fox", "negative": "a hat"}
    plain = {"x": 0, "y": 0, "width": 1, "height": 1, "prompt": "a cat"}
    p = Processing(["a cat", "a dog"], "bad")
    stock = sample(p)
    whole = settings(tile=512, regions=[{**plain, "prompt": "a cat"}])
    assert (host.made(Processing(["a cat", "a cat"], "bad"), whole) - sample(Processing(["a cat", "a cat"], "bad"))).abs().max() < 1e-4
    model.encoded.clear()
    seen = contexts(host)
    got = host.made(p, settings(tile=512, regions=[left]))
    assert not torch.equal(got, stock)
    assert model.encoded.count("a fox") == model.encoded.count("a hat") == 1
    seen_here = seen[0] if together else torch.cat(seen[:2])
    parser = importlib.import_module("modules.prompt_parser")
    fox = model.get_learned_conditioning(parser.SdConditioning(["a fox"]))
    hat = model.get_learned_conditioning(parser.SdConditioning(["a hat"], is_negative_prompt=True))
    if kind == "sdxl":
        fox, hat = fox["crossattn"], hat["crossattn"]
    rows = list(seen_here)
    assert sum(torch.equal(row, fox[0]) for row in rows) == 2 and sum(torch.equal(row, hat[0]) for row in rows) == 2
    assert len(rows) == 8


def test_a_region_without_a_negative_keeps_the_picture_s(host):
    model = host.load()
    seen = contexts(host)
    host.made(Processing("a cat", "bad"), settings(tile=512, regions=[{"x": 0, "y": 0, "width": 0.5, "height": 1, "prompt": "a fox"}]))
    parser = importlib.import_module("modules.prompt_parser")
    bad = model.get_learned_conditioning(parser.SdConditioning(["bad"], is_negative_prompt=True))[0]
    assert [torch.equal(row, bad) for row in seen[0]] == [False, True, False, True]


def test_prompt_editing_and_other_lengths_in_regions(host):
    model = host.load()
    seen = contexts(host)
    long = "a fox in a very long prompt of [red:blue:1] leaves that needs two times as many tokens"
    host.made(Processing("a cat"), settings(tile=512, regions=[{"x": 0, "y": 0, "width": 0.5, "height": 1, "prompt": long}]))
    parser = importlib.import_module("modules.prompt_parser")
    texts = [long.replace("[red:blue:1]", colour) for colour in ("red", "blue")]
    red, blue = model.get_learned_conditioning(parser.SdConditioning(texts))  # together, as they are made: alone, bits may differ
    assert [rows.shape[1] for rows in seen] == [154] * 3
    assert [torch.equal(rows[2], red) for rows in seen] == [True, True, False] and torch.equal(seen[2][2], blue)
    assert torch.equal(seen[0][0][77:], model.cond_stage_model_empty_prompt[0])


def test_networks_in_a_region_s_prompt_are_left_out_and_told(host):
    model = host.load()
    p = Processing("a cat")
    host.made(p, settings(regions=[{"x": 0, "y": 0, "width": 0.5, "height": 1, "prompt": "a fox <lora:red:1>"}]))
    assert "a fox " in model.encoded and len(p.comments) == 1 and "lora counts for a whole picture" in p.comments[0]


def test_what_is_not_tiled_is_said_once_and_made_as_ever(host, caplog):
    caplog.set_level(logging.WARNING, logger="async_lowvram")
    model = host.load()
    unet = model.model.diffusion_model
    p = Processing("a cat")
    stock = sample(p)
    unet.forward = lambda *args, before=unet.forward: before(*args)  # as ControlNet does
    assert torch.equal(host.made(p, settings()), stock)
    del unet.forward
    assert "ControlNet" in host.status["refused"] and len(p.comments) == 1

    hint = torch.zeros(2, 3, 128, 192)
    plain = model.apply_model
    model.apply_model = lambda x, t, cond: plain(x, t, {key: value for key, value in cond.items() if key != "hint"})
    denoisers, conditions = host.denoisers, host.denoisers._conditions
    denoisers._conditions = lambda cond, image: {**conditions(cond, image), "hint": hint}
    before = model.apply_model
    p = Processing("a cat")
    assert torch.equal(host.made(p, settings()), stock)
    assert "cond['hint'] of shape (2, 3, 128, 192)" in host.status["refused"] and len(p.comments) == 1
    assert model.apply_model is before  # somebody else's, on the instance as well
    del model.apply_model


def test_an_interrupt_leaves_nothing_behind(host):
    model = host.load()
    p = Processing("a cat")

    def interrupt(module, args):
        raise host.sd_samplers_common.InterruptedException

    handle = model.model.diffusion_model.middle_block.register_forward_pre_hook(interrupt)
    host.room = 1
    with pytest.raises(host.sd_samplers_common.InterruptedException):
        host.made(p, settings())
    handle.remove()
    assert "apply_model" not in vars(model)


def test_a_group_that_needs_too_much_is_halved(host):
    model = host.load()
    p, chosen = Processing("a cat"), settings()
    expected = host.made(p, chosen)

    def hungry(module, args):
        if len(args[0]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.model.diffusion_model.register_forward_pre_hook(hungry)
    got = host.made(p, chosen)
    handle.remove()
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert host.status["sizes"][0]["at_once"] == 1 and host.status["sizes"][0]["halved"] == 3


def test_patches_of_others_over_ours_stay(host):
    host.load()
    p = Processing("a cat")
    stock = sample(p)
    host.large.begin(p, settings())
    ours = host.denoisers.CFGDenoiser.forward
    theirs = lambda self, *args, **kwargs: ours(self, *args, **kwargs)  # noqa: E731
    host.denoisers.CFGDenoiser.forward = theirs
    host.large.end()
    assert host.denoisers.CFGDenoiser.forward is theirs and torch.equal(sample(p), stock)
    host.large.begin(p, settings())
    assert not torch.equal(sample(p), stock)
    host.large.end()
    host.denoisers.CFGDenoiser.forward = host.untouched[0]
