"""Models come and go in the real WebUI: every switch of weights gives stock's pictures, with the mover at work.

    SD_WEBUI_URL        a WebUI with the extension (--lowvram --api), ASYNC_LOWVRAM_CHECK_PLACEMENT=1
    SD_WEBUI_STOCK_URL  the same WebUI and models folder without it

The models folder holds two or more checkpoints without a config file of their own (switched in place), one as a .ckpt, one
with its own (another architecture), and two VAEs. Run with `-s` to see the pairs of hashes and the counters. Its siblings are
test_e2e_lifecycle_threads.py (several threads, Reload UI, on and off) and test_e2e_lifecycle_memory.py (what is given back).

What is expected of the counters: nothing here changes weights *inside* a pass, so nothing is ever written back; everything is
off the device when the host changes weights, so nothing is fetched again; weights changed in place are simply the next
copy's source.
"""

from __future__ import annotations

import os

import pytest

URL, STOCK_URL = os.environ.get("SD_WEBUI_URL", ""), os.environ.get("SD_WEBUI_STOCK_URL", "")

pytestmark = [
    pytest.mark.webui,
    pytest.mark.skipif(not (URL and STOCK_URL), reason="SD_WEBUI_URL and SD_WEBUI_STOCK_URL name no running WebUIs"),
]

if URL and STOCK_URL:
    from lifecycle_pair import JOB, Pair

QUIET = {"write_backs": 0, "refetches": 0}
BUDGETS = pytest.mark.parametrize("budget_mb", [None, 0], ids=["quarter", "automatic"])
HIRES = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.7, "hr_second_pass_steps": 4}


@pytest.fixture(scope="module")
def servers():
    return Pair(URL, STOCK_URL)


@pytest.fixture(autouse=True)
def pair(request):
    """Each test starts from the base checkpoint, one model in memory, a quarter of the UNet as budget."""
    if not (URL and STOCK_URL):
        yield None
        return
    servers = request.getfixturevalue("servers")
    servers.as_found()
    yield servers
    servers.as_found(budget_mb=0)


@pytest.fixture
def same(pair):
    """Titles of checkpoints that are switched in place, the base last."""
    if not pair.same:
        pytest.skip("the models folder has fewer than two checkpoints that share one config file")
    return [*pair.same, pair.base]


@pytest.fixture
def other(pair):
    if not pair.other:
        pytest.skip("the models folder has no checkpoint with a config file of its own")
    return pair.other[0]


@pytest.fixture
def vae(pair):
    if not pair.vaes:
        pytest.skip("the models folder has no VAE")
    return pair.vaes[0]


def switch(pair, case, titles, **options):
    """To each checkpoint in turn, through the settings; a picture after each, and a second one where it has come to rest."""
    pair.both(**options)
    for title in titles:
        pair.both(sd_model_checkpoint=title)
        pair.check(f"{case}: {title}", **QUIET)
    pair.check(f"{case}: {titles[-1]}, once more", learning_passes=0, adopted=0, **QUIET)


@BUDGETS
def test_switch_in_place(pair, same, budget_mb):
    """.safetensors and .ckpt; the same parameters get other values."""
    pair.as_found(budget_mb)
    pair.check("in place, before")
    switch(pair, "in place", [*same, *same])


@BUDGETS
def test_switch_across_architectures(pair, other, budget_mb):
    pair.as_found(budget_mb)
    pair.check("across, before")
    switch(pair, "across", [other, pair.base] * 3)


def test_switches_mixed(pair, same, other):
    switch(pair, "mixed", [title for each in same for title in (other, each)])


@pytest.mark.parametrize("limit", [2, 3])
@pytest.mark.parametrize("keep_in_cpu", [True, False])
def test_several_in_memory(pair, same, other, limit, keep_in_cpu):
    """Models beside each other; beyond the limit the oldest goes, and comes back as a new one."""
    case = f"{limit} in memory, keep_in_cpu {keep_in_cpu}"
    titles = [other, same[0], pair.base, other, same[0], same[0], other, pair.base]
    switch(pair, case, titles, sd_checkpoints_limit=limit, sd_checkpoints_keep_in_cpu=keep_in_cpu)
    models = {name.partition("#")[2] for name in pair.ours.status()["networks"]}
    assert len(models) == limit


def test_limit_lowered_again(pair, same, other):
    switch(pair, "limit 3", [other, same[0]], sd_checkpoints_limit=3)
    switch(pair, "limit 1", [pair.base, other, pair.base], sd_checkpoints_limit=1)
    assert len({name.partition("#")[2] for name in pair.ours.status()["networks"]}) == 1


def test_checkpoint_cache(pair, same, other):
    """State dicts kept in RAM: the host copies out of them, and they must not be ours."""
    switch(pair, "cache 2", [same[0], pair.base, other, same[0], pair.base, other], sd_checkpoint_cache=2)


def swapping(pair, request, which):
    return request.getfixturevalue("same")[0] if which == "in place" else request.getfixturevalue("other")


SWAPS = pytest.mark.parametrize("which", ["in place", "across"])
LIMITS = pytest.mark.parametrize("limit", [1, 2])


@BUDGETS
@LIMITS
@SWAPS
def test_refiner(pair, request, which, limit, budget_mb):
    """Another checkpoint takes over between two passes, and the first one is back for the next job."""
    second = swapping(pair, request, which)
    pair.as_found(budget_mb)
    pair.both(sd_checkpoints_limit=limit)
    pair.check("before")
    job = {**JOB, "steps": 8, "refiner_checkpoint": second, "refiner_switch_at": 0.5}
    for number in range(3):
        pair.check(f"refiner {which}, limit {limit}, job {number}", job, **QUIET)
    pair.check(f"refiner {which}, limit {limit}, without it again", {**JOB, "steps": 6}, **QUIET)


@BUDGETS
@LIMITS
@SWAPS
def test_hires_checkpoint(pair, request, which, limit, budget_mb):
    second = swapping(pair, request, which)
    pair.as_found(budget_mb)
    pair.both(sd_checkpoints_limit=limit)
    job = {**JOB, **HIRES, "hr_checkpoint_name": second}
    for number in range(2):
        pair.check(f"hires checkpoint {which}, limit {limit}, job {number}", job, **QUIET)
    pair.check(f"hires checkpoint {which}, limit {limit}, hires without it", {**JOB, **HIRES}, **QUIET)


@LIMITS
@pytest.mark.parametrize("refined", ["first pass", "second pass", "both passes"])
def test_refiner_and_hires_checkpoint(pair, same, other, limit, refined):
    """Up to three checkpoints in one picture."""
    pair.both(sd_checkpoints_limit=limit, hires_fix_refiner_pass=refined)
    job = {**JOB, **HIRES, "steps": 6, "refiner_checkpoint": same[0], "refiner_switch_at": 0.5, "hr_checkpoint_name": other}
    for number in range(2):
        pair.check(f"refiner in {refined} and hires checkpoint, limit {limit}, job {number}", job, **QUIET)
    pair.check(f"refiner in {refined} and hires checkpoint, limit {limit}, without", {**JOB, "steps": 6}, **QUIET)


@pytest.mark.parametrize("restore", [True, False])
@SWAPS
def test_override_settings(pair, request, which, restore):
    second = swapping(pair, request, which)
    overridden = {**JOB, "override_settings": {"sd_model_checkpoint": second}, "override_settings_restore_afterwards": restore}
    for number in range(2):
        pair.check(f"override {which}, restore {restore}, job {number}", overridden, **QUIET)
        pair.check(f"override {which}, restore {restore}, plain {number}", {**JOB, "steps": 6}, **QUIET)
    titles = [server.get("/sdapi/v1/options")["sd_model_checkpoint"] for server in (pair.ours, pair.stock)]
    assert titles[0] == titles[1]


@BUDGETS
def test_vae_switch(pair, vae, budget_mb):
    """The same VAE module gets other weights, and its own back; img2img uses it both ways."""
    from test_e2e import init_image
    from webui_client import encode

    pair.as_found(budget_mb)
    img2img = {**JOB, "init_images": [encode(init_image(128, 128))], "denoising_strength": 0.6, "steps": 6}
    pair.check("VAE, before")
    plain, _ = pair.pictures(JOB)
    for name in (pair.vaes[0], "None", pair.vaes[-1], pair.vaes[0], "Automatic", pair.vaes[-1], "None"):
        pair.both(sd_vae=name)
        pair.check(f"VAE {name}", adopted=0, **QUIET)
        pair.check(f"VAE {name}, img2img", img2img, "img2img", adopted=0, **QUIET)
        assert (pair.ours.pictures("txt2img", JOB) == plain) == (name in ("None", "Automatic"))


def test_vae_by_override(pair, vae):
    for restore in (True, False):
        job = {**JOB, "override_settings": {"sd_vae": vae}, "override_settings_restore_afterwards": restore}
        for number in range(2):
            pair.check(f"VAE override, restore {restore}, job {number}", job, adopted=0, **QUIET)
            pair.check(f"VAE override, restore {restore}, plain {number}", adopted=0, **QUIET)
        pair.both(sd_vae="Automatic")


@LIMITS
def test_vae_and_checkpoint(pair, same, other, vae, limit):
    """A VAE chosen in Settings stays on whatever checkpoint comes; the base VAE of each is its own."""
    pair.both(sd_checkpoints_limit=limit)
    steps = [(same[0], vae), (same[0], "None"), (other, "None"), (pair.base, vae), (other, pair.vaes[-1]), (pair.base, "None")]
    for title, name in [*steps, *steps]:
        pair.both(sd_vae=name)
        pair.both(sd_model_checkpoint=title)
        pair.check(f"VAE {name} on {title}, limit {limit}", **QUIET)
    both_at_once = {"sd_model_checkpoint": other, "sd_vae": vae}
    job = {**JOB, "override_settings": both_at_once, "override_settings_restore_afterwards": True}
    pair.check(f"VAE and checkpoint overridden, limit {limit}", job, **QUIET)
    pair.check(f"VAE and checkpoint restored, limit {limit}", {**JOB, "steps": 6}, **QUIET)
