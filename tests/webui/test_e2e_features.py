"""The real WebUI's features with and without the extension: embeddings, hypernetworks, everything that patches attention or
convolutions, upscalers and live previews. Same pictures, counters as expected.

    SD_WEBUI_URL, SD_WEBUI_STOCK_URL   as for test_e2e.py; both on this machine, with folders this test may write into
    make_fixtures.py --models FOLDER   once, before the servers start, for the upscaler

`test_e2e_training.py` and `test_e2e_precision.py` are about what changes weights. Run with `-s` to see hashes and counters.
"""

# ruff: noqa: F811 - the fixtures are imported

from __future__ import annotations

import make_fixtures
import pytest
from pair_fixtures import BIG, JOB, QUARTER_AND_AUTOMATIC, STEPS, hires, img2img, inpainting, needs_servers, pair, picture, servers  # noqa: F401

pytestmark = needs_servers


# -- textual inversion -----------------------------------------------------------------------------------------------------
@QUARTER_AND_AUTOMATIC
def test_embedding_in_a_prompt(pair):
    for folder in pair.flags("embeddings_dir"):
        make_fixtures.write_embedding(folder)
    pair.both("/sdapi/v1/refresh-embeddings", {})
    assert make_fixtures.EMBEDDING in pair.ours.get("/sdapi/v1/embeddings")["loaded"]
    with_it = pair.same("embedding", {**JOB, "prompt": f"a photo of {make_fixtures.EMBEDDING}, (evening:1.2)"})
    without = pair.same("no embedding", {**JOB, "prompt": "a photo of, (evening:1.2)"})
    assert with_it != without
    pair.same("embedding in the negative prompt", {**JOB, "negative_prompt": make_fixtures.EMBEDDING})


@QUARTER_AND_AUTOMATIC
def test_create_embedding(pair):
    """The host sends token ids to `weight.device` and calls the hooked embedding layer outside any pass."""
    written, got = [], []
    for number, (server, folder) in enumerate(zip(pair.servers, pair.flags("embeddings_dir"), strict=True)):
        name = f"feat-created-{number}"
        order = {"name": name, "num_vectors_per_token": 2, "overwrite_old": True, "init_text": "red cat"}
        said = server.post("/sdapi/v1/create/embedding", order)["info"]
        assert "error" not in said, said
        written.append(make_fixtures.hash_tensors(make_fixtures.read_torch(folder / f"{name}.pt")["string_to_param"].values()))
    print(f"\n{pair.budget} | create embedding | ours {written[0]} | stock {written[1]}")
    assert written[0] == written[1]
    pair.check_idle()
    before = pair.ours.status()
    for number, server in enumerate(pair.servers):
        got.append(server.pictures("txt2img", {**JOB, "prompt": f"a photo of feat-created-{number} at home"}))
    pair.judge("created embedding used", *got, before, pair.ours.status())


# -- hypernetworks ---------------------------------------------------------------------------------------------------------
def attention_widths(pair):
    """Of the UNet's attentions, as a hypernetwork must know them."""
    checkpoint = make_fixtures.Checkpoint(pair.checkpoint())
    ends = (".attn1.to_k.weight", ".attn2.to_k.weight")
    return tuple(sorted({checkpoint.shape(name)[1] for name in checkpoint.names("model.diffusion_model.") if name.endswith(ends)}))


def create_hypernetworks(pair, sizes):
    """One for each server, of random weights; the host also looks for new files then. Returns their hashes."""
    written = []
    for number, (server, folder) in enumerate(zip(pair.servers, pair.flags("hypernetwork_dir"), strict=True)):
        server.pictures("txt2img", {**JOB, "steps": 1})  # its seed is also that of the new weights
        name = f"feat-created-{number}"
        order = {"enable_sizes": sizes, "layer_structure": [1, 2, 1], "activation_func": "relu", "weight_init": "XavierNormal"}
        said = server.post("/sdapi/v1/create/hypernetwork", {"name": name, "overwrite_old": True, **order})["info"]
        assert "error" not in said, said
        parts = make_fixtures.read_torch(folder / f"{name}.pt")
        tensors = [tensor for size in sizes for half in parts[size] for _, tensor in sorted(half.items())]
        written.append(make_fixtures.hash_tensors(tensors))
    return written


@QUARTER_AND_AUTOMATIC
def test_hypernetwork_on_and_off(pair):
    sizes = attention_widths(pair)
    for folder in pair.folders("hypernetwork_dir"):
        make_fixtures.write_hypernetwork(folder, sizes)
    written = create_hypernetworks(pair, list(sizes))
    print(f"\n{pair.budget} | create hypernetwork | ours {written[0]} | stock {written[1]}")
    assert written[0] == written[1]
    plain = pair.same("no hypernetwork")
    on = pair.same("hypernetwork on", {**JOB, "prompt": f"{JOB['prompt']} <hypernet:{make_fixtures.HYPERNETWORK}:1>"})
    half = pair.same("at half strength", {**JOB, "prompt": f"{JOB['prompt']} <hypernet:{make_fixtures.HYPERNETWORK}:0.5>"})
    assert pair.same("off again") == plain
    assert len({plain[0], on[0], half[0]}) == 3
    before, got = pair.ours.status(), []
    for number, server in enumerate(pair.servers):
        got.append(server.pictures("txt2img", {**JOB, "prompt": f"{JOB['prompt']} <hypernet:feat-created-{number}:1>"}))
    pair.judge("the created one", *got, before, pair.ours.status())
    assert got[0] != plain


# -- what patches attention and convolutions -----------------------------------------------------------------------------
ATTENTION = [
    "sdp - scaled dot product",
    "Doggettx",
    "InvokeAI",
    "sub-quadratic",
    "V1 - original v1",
    "None",
    "sdp-no-mem - scaled dot product without memory efficient attention",
]


def test_attention_switched_between_jobs(pair):
    """Each switch also hijacks the model anew: another wrapper around the text encoder, another layer around its embedding."""
    plain = pair.same("attention Automatic")
    for title in ATTENTION:
        with pair.options(cross_attention_optimization=title):
            pair.same(f"attention {title.split(' ')[0]}", expect=None)
            pair.same(f"attention {title.split(' ')[0]} again")
    assert pair.same("attention Automatic again", expect=None) == plain


@QUARTER_AND_AUTOMATIC
def test_attention_switched_and_back(pair):
    plain = pair.same("attention Automatic")
    with pair.options(cross_attention_optimization="InvokeAI"):
        pair.same("attention InvokeAI", expect=None)
    assert pair.same("attention Automatic again", expect=None) == plain


@QUARTER_AND_AUTOMATIC
def test_token_merging(pair):
    plain = pair.same("no token merging")
    with pair.options(token_merging_ratio=0.5):
        assert pair.same("token merging 0.5") != plain
    with pair.options(token_merging_ratio_hr=0.4):
        pair.same("token merging in the hires pass", hires(hr_upscaler="Latent"))
    assert pair.same("no token merging again") == plain


HYPERTILE = {
    "hypertile_enable_unet": False, "hypertile_enable_vae": False, "hypertile_max_tile_unet": 256, "hypertile_max_tile_vae": 128,
    "hypertile_swap_size_unet": 3, "hypertile_swap_size_vae": 3,
}  # fmt: skip


@pytest.mark.parametrize("sides", ["unet", "vae", "both"])
def test_hypertile(pair, sides):
    """Instances of attention get a `forward` of their own, under our hooks."""
    pair.set_options(**HYPERTILE)
    plain = pair.same("no Hypertile", BIG)
    # Small tiles: those by default leave pictures of this size alone.
    small = {"hypertile_max_tile_unet": 64, "hypertile_max_tile_vae": 32, "hypertile_swap_size_unet": 1, "hypertile_swap_size_vae": 1}
    on = {"hypertile_enable_unet": sides != "vae", "hypertile_enable_vae": sides != "unet"}
    with pair.options(back=HYPERTILE, **small, **on):
        assert pair.same(f"Hypertile {sides}", BIG) != plain
    assert pair.same("no Hypertile again", BIG) == plain


@QUARTER_AND_AUTOMATIC
def test_tiling(pair):
    """The padding mode of every convolution changes under the hooks."""
    plain = pair.same("no tiling")
    assert pair.same("tiling", {**JOB, "tiling": True}) != plain
    assert pair.same("no tiling again") == plain


def test_clip_skip(pair):
    plain = pair.same("CLIP skip 1")
    with pair.options(CLIP_stop_at_last_layers=2):
        assert pair.same("CLIP skip 2") != plain
    assert pair.same("CLIP skip 1 again") == plain


def test_negative_guidance_minimum_sigma(pair):
    """Some passes run without the negative prompt, that is, at half the batch."""
    job = {**JOB, "steps": STEPS + 4}
    plain = pair.same("no minimum sigma", job)
    with pair.options(s_min_uncond=8.0):
        assert pair.same("minimum sigma 8", job) != plain
    with pair.options(s_min_uncond=8.0, s_min_uncond_all=True):
        assert pair.same("minimum sigma 8, all steps", job) != plain


def test_soft_inpainting(pair):
    script = {"alwayson_scripts": {"soft inpainting": {"args": [True, 1, 0.5, 4, 0, 0.5, 2]}}}
    assert pair.same("soft inpainting", inpainting(**script), "img2img") != pair.same("inpainting", inpainting(), "img2img")


# -- upscalers -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def upscaler(pair):
    for server in pair.servers:
        if make_fixtures.UPSCALER not in [found["name"] for found in server.get("/sdapi/v1/upscalers")]:
            pytest.skip("run make_fixtures.py --models FOLDER before the servers start")
    return make_fixtures.UPSCALER


@QUARTER_AND_AUTOMATIC
def test_upscaler_in_hires_fix(pair, upscaler):
    lanczos = pair.same("hires, Lanczos", hires(hr_upscaler="Lanczos"))
    assert pair.same("hires, ESRGAN", hires(hr_upscaler=upscaler)) != lanczos
    pair.same("hires, ESRGAN, two at once", hires(hr_upscaler=upscaler, batch_size=2))


@pytest.mark.parametrize("name", ["Latent", "Latent (nearest-exact)", "Latent (bicubic antialiased)", "Nearest"])
def test_other_upscalers_in_hires_fix(pair, name):
    pair.same(f"hires, {name}", hires(hr_upscaler=name))


def test_upscaler_before_img2img(pair, upscaler):
    with pair.options(upscaler_for_img2img=upscaler):
        pair.same("img2img from a small picture, ESRGAN", img2img(init_images=[picture(96)]), "img2img")


def test_sd_upscale_script(pair, upscaler):
    names = [found["name"] for found in pair.ours.get("/sdapi/v1/upscalers")]
    script = {"script_name": "sd upscale", "script_args": ["", 64, names.index(upscaler), 2.0]}
    pair.same("SD upscale", img2img(init_images=[picture(128)], width=192, height=192, **script), "img2img")


def test_extras_between_jobs(pair, upscaler):
    plain = pair.same("before extras")
    order = {"image": picture(64), "upscaling_resize": 2, "upscaler_1": upscaler}
    got, wanted = (server.extras(order) for server in pair.servers)
    print(f"\n{pair.budget} | extras | ours {got[0]} | stock {wanted[0]}")
    assert got == wanted
    pair.check_idle()
    assert pair.same("after extras") == plain


# -- live previews -----------------------------------------------------------------------------------------------------------
@QUARTER_AND_AUTOMATIC
@pytest.mark.parametrize("method", ["Full", "Approx NN", "Approx cheap"])
def test_live_previews(pair, method):
    with pair.options(live_previews_enable=False):
        plain = pair.same("no previews")
    before = pair.ours.status()
    on = {"live_previews_enable": True, "show_progress_every_n_steps": 1, "show_progress_type": method}
    with pair.options(**on, live_preview_allow_lowvram_full=True):
        assert pair.same(f"previews {method}") == plain
    if method == "Full":
        assert decodes(pair.ours.status()) >= decodes(before) + 2, "one for the picture, and no preview"


def decodes(status):
    """By the VAE: in the middle of the UNet's passes, as stock does, or on the preview's own thread, which may skip some."""
    return status["networks"]["vae_decode"]["passes"] + status["preview"]["decoded"]
