"""The real WebUI with the extension against the real WebUI without it: the same pictures, with proof that we were at work.

    SD_WEBUI_URL        a WebUI with the extension (--lowvram --api)
    SD_WEBUI_STOCK_URL  the same WebUI, checkpoint and settings without it
    SD_WEBUI_STEPS      sampling steps of a picture, 4 unless given

On a machine without a GPU both run with `--use-cpu all`, the first one with ASYNC_LOWVRAM_DEVICE=simulated and
ASYNC_LOWVRAM_CHECK_PLACEMENT=1. The budget is set here, to a quarter of the UNet. Run with `-s` to see the pairs of hashes.
"""

from __future__ import annotations

import os

import pytest

URL, STOCK_URL = os.environ.get("SD_WEBUI_URL", ""), os.environ.get("SD_WEBUI_STOCK_URL", "")
STEPS = int(os.environ.get("SD_WEBUI_STEPS", "4"))
MIB = 1 << 20

pytestmark = [
    pytest.mark.webui,
    pytest.mark.skipif(not (URL and STOCK_URL), reason="SD_WEBUI_URL and SD_WEBUI_STOCK_URL name no running WebUIs"),
]

if URL and STOCK_URL:
    from PIL import Image, ImageDraw
    from webui_client import Background, Server, encode

TXT2IMG = {
    "prompt": "a lighthouse on a rock, waves, evening light",
    "negative_prompt": "blurry",
    "seed": 12345,
    "steps": STEPS,
    "width": 256,
    "height": 256,
    "cfg_scale": 7,
    "sampler_name": "Euler a",
    "save_images": False,
    "do_not_save_grid": True,
    "do_not_save_samples": True,
}
SAMPLERS = ["Euler a", "DPM++ 2M", "DPM++ 2S a", "Heun", "DDIM", "UniPC"]
HOST_DEFAULTS = {"batch_cond_uncond": True}  # for both: an earlier run may have left something else
DEFAULTS = {**HOST_DEFAULTS, "async_lowvram_enabled": True, "async_lowvram_lookahead_mb": 0, "async_lowvram_pinned_mb": 0}


def init_image(width=256, height=256):
    picture = Image.new("RGB", (width, height))
    picture.putdata([(x % 256, y % 256, (x * y) % 256) for y in range(height) for x in range(width)])
    return picture


def img2img(**changes):
    return {**TXT2IMG, "init_images": [encode(init_image())], "denoising_strength": 0.75, **changes}


def inpainting(**changes):
    mask = Image.new("L", (256, 256), 0)
    ImageDraw.Draw(mask).ellipse((60, 60, 200, 200), fill=255)
    return img2img(mask=encode(mask), mask_blur=4, inpainting_fill=1, **changes)


@pytest.fixture(scope="module")
def ours():
    server = Server(URL)
    server.set_options(**DEFAULTS)
    server.pictures("txt2img", TXT2IMG)
    unet = server.status()["networks"]["unet"]
    # Off and on again, so that the counters start anew under the budget they are held against.
    server.set_options(async_lowvram_enabled=False, async_lowvram_budget_mb=max(1, unet["weight_bytes"] // 4 // MIB))
    server.pictures("txt2img", {**TXT2IMG, "steps": 1})
    server.set_options(async_lowvram_enabled=True)
    for kind, job in (("txt2img", TXT2IMG), ("img2img", img2img()), ("img2img", img2img())):  # every network learns its order
        server.pictures(kind, job)
    yield server
    server.set_options(**DEFAULTS, async_lowvram_budget_mb=0)


@pytest.fixture(scope="module")
def stock():
    server = Server(STOCK_URL)
    server.set_options(**HOST_DEFAULTS)
    return server


@pytest.fixture(autouse=True)
def as_found(request):
    """Each test starts from the same settings, whatever the one before left."""
    if URL and STOCK_URL:
        request.getfixturevalue("ours").set_options(**DEFAULTS)
    yield


def check_promises(status, *, peak=True):
    """What must hold after any job: residents and ring within the budget, nothing on the wrong device, nothing left. `peak`: no
    larger budget was in force since the server's start."""
    assert status["state"] == "active", status["reason"]
    for name, network in status["networks"].items():
        if network["budget_bytes"]:
            assert network["resident_bytes"] + network["ring_bytes"] <= network["budget_bytes"], name
    largest = max(network["budget_bytes"] for network in status["networks"].values())
    assert 0 < status["peak_weight_bytes"] and (not peak or status["peak_weight_bytes"] <= largest)
    if status["device"] == "simulated":
        assert status["placement_faults"] is not None, "start the server with ASYNC_LOWVRAM_CHECK_PLACEMENT=1"
    assert status["placement_faults"] in (0, None), status["last_error"]
    assert status["allocated_bytes"] == 0


def check_worked(before, after, *, steady=True):
    """The job in between really streamed: a mover that stands aside proves nothing."""
    check_promises(after)
    hits, misses = after["hits"] - before["hits"], after["misses"] - before["misses"]
    assert after["passes"] > before["passes"]
    assert hits > 0
    assert after["streamed_bytes"] > before["streamed_bytes"]
    stalls = sum(network["stall_seconds"] for network in after["networks"].values())
    assert stalls > 0
    if steady:
        assert after["host_waits"] == before["host_waits"]
        # The first units of each network entered are fetched on demand; within the cycle nothing may be.
        assert misses <= 0.02 * hits + 2 * len(after["networks"]), (hits, misses)


def same(ours, stock, name, kind, job, *, steady=True):
    before = ours.status()
    got = ours.pictures(kind, job)
    check_worked(before, ours.status(), steady=steady)
    wanted = stock.pictures(kind, job)
    print(f"\n{name}: ours {' '.join(got)}  stock {' '.join(wanted)}")
    assert got == wanted
    assert got


@pytest.mark.parametrize(("width", "height"), [(256, 256), (256, 384), (448, 320)])
def test_sizes(ours, stock, width, height):
    same(ours, stock, f"txt2img {width}x{height}", "txt2img", {**TXT2IMG, "width": width, "height": height})


def test_batches(ours, stock):
    same(ours, stock, "batch 3 x 2", "txt2img", {**TXT2IMG, "batch_size": 3, "n_iter": 2})


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(ours, stock, sampler):
    same(ours, stock, sampler, "txt2img", {**TXT2IMG, "sampler_name": sampler})


def test_cond_and_uncond_apart(ours, stock):
    job = {**TXT2IMG, "override_settings": {"batch_cond_uncond": False}, "override_settings_restore_afterwards": True}
    same(ours, stock, "batch_cond_uncond off", "txt2img", job)


def test_a_long_prompt(ours, stock):
    job = {**TXT2IMG, "prompt": ", ".join(f"detail {number} of (many:1.2)" for number in range(40))}
    same(ours, stock, "long prompt", "txt2img", job)


def test_img2img(ours, stock):
    same(ours, stock, "img2img", "img2img", img2img())


def test_inpainting(ours, stock):
    same(ours, stock, "inpainting", "img2img", inpainting())


def test_interrupt_then_generate(ours, stock):
    running = Background(ours, "txt2img", {**TXT2IMG, "steps": 40})
    ours.wait_for_step(2, running.thread)
    ours.post("/sdapi/v1/interrupt", {})
    running.result()
    check_promises(ours.status())
    same(ours, stock, "after an interrupt", "txt2img", TXT2IMG, steady=False)
    same(ours, stock, "and once more", "txt2img", TXT2IMG)


def test_unload_and_reload_during_a_job(ours, stock):
    """From API threads, without the host's queue lock."""
    job = {**TXT2IMG, "steps": 12}
    running = Background(ours, "txt2img", job)
    ours.wait_for_step(2, running.thread)
    ours.post("/sdapi/v1/unload-checkpoint", {})
    ours.post("/sdapi/v1/reload-checkpoint", {})
    got, wanted = running.result(), stock.pictures("txt2img", job)
    print(f"\nunload during the job: ours {got}  stock {wanted}")
    assert got == wanted
    same(ours, stock, "after it", "txt2img", TXT2IMG, steady=False)


def test_slider_moved_during_generation(ours, stock):
    job = {**TXT2IMG, "steps": 16}
    unet = ours.status()["networks"]["unet"]
    least = unet["ring_bytes"]
    running = Background(ours, "txt2img", job)
    ours.wait_for_step(3, running.thread)
    moved = min(unet["budget_bytes"], 2 * least) // MIB
    ours.set_options(async_lowvram_lookahead_mb=moved)
    ours.wait_for_step(6, running.thread)
    after = ours.status()["networks"]["unet"]
    got, wanted = running.result(), stock.pictures("txt2img", job)
    print(f"\nslider moved: ours {got}  stock {wanted}; ring {least} -> {after['ring_bytes']} bytes")
    assert got == wanted
    assert after["ring_bytes"] != least
    assert after["resident_bytes"] + after["ring_bytes"] <= after["budget_bytes"]


@pytest.mark.parametrize("hostile", ["abc", -5, 1e9, None])
def test_hostile_settings(ours, stock, hostile):
    ours.set_options(async_lowvram_lookahead_mb=hostile)
    same(ours, stock, f"lookahead {hostile!r}", "txt2img", TXT2IMG, steady=False)


def test_checkpoint_switch_and_back(ours, stock):
    titles = [model["title"] for model in ours.get("/sdapi/v1/sd-models")]
    if len(titles) < 2:
        pytest.skip("the WebUI has one checkpoint only")
    present = ours.get("/sdapi/v1/options")["sd_model_checkpoint"]
    other = next(title for title in titles if title.split(" [")[0] != present.split(" [")[0])
    for title in (other, present):
        for server in (ours, stock):
            server.set_options(sd_model_checkpoint=title)
        got, wanted = ours.pictures("txt2img", TXT2IMG), stock.pictures("txt2img", TXT2IMG)
        print(f"\n{title}: ours {got}  stock {wanted}")
        assert got == wanted
        same(ours, stock, f"{title} again", "txt2img", TXT2IMG, steady=False)


def test_off_and_on(ours, stock):
    wanted = stock.pictures("txt2img", TXT2IMG)
    ours.set_options(async_lowvram_enabled=False)
    got = ours.pictures("txt2img", TXT2IMG)
    status = ours.status()
    print(f"\nswitched off: ours {got}  stock {wanted}")
    assert got == wanted
    assert (status["state"], status["networks"]) == ("standing_down", {})
    assert status["allocated_bytes"] == 0 and status["pinned_bytes"] == 0
    ours.set_options(async_lowvram_enabled=True)
    assert ours.pictures("txt2img", TXT2IMG) == wanted  # learns again
    same(ours, stock, "switched on again", "txt2img", TXT2IMG)


def test_twenty_in_a_row(ours, stock):
    """Memory after job 20 against job 5: main memory, pinned memory, the device."""
    marks = {}
    for number in range(1, 21):
        # Another prompt each time: the host keeps the encoding of the last one, and the text encoder would stand by.
        job = {**TXT2IMG, "seed": 1000 + number, "prompt": f"{number} {TXT2IMG['prompt']}"}
        before = ours.status()
        got = ours.pictures("txt2img", job)
        status = ours.status()
        check_worked(before, status)
        wanted = stock.pictures("txt2img", job)
        print(f"\njob {number}: ours {' '.join(got)}  stock {' '.join(wanted)}")
        assert got == wanted
        marks[number] = {
            "main": ours.resident_memory(),
            "masters": status["host_bytes"],
            "pinned": status["pinned_bytes"],
            "device": status["allocated_bytes"],
            "device peak": status["peak_weight_bytes"],
        }
    for what, fifth in marks[5].items():
        print(f"{what}: job 5 {fifth / MIB:.1f} MB, job 20 {marks[20][what] / MIB:.1f} MB")
        assert marks[20][what] <= fifth + 16 * MIB, what
