"""Out of memory in the middle of a UNet pass, in the real WebUI: the pass is tried again, and the picture is the one stock makes.

Set up and run as `test_e2e_lora`, with `probe_extension` copied into both servers' `extensions` folders: it raises the errors. Stock
is asked for the same pictures without them; where the second try fails as well, for the same error.
"""

from __future__ import annotations

import urllib.error
from typing import Any

import pytest
from lora_fixtures import NEEDS_SERVERS

pytestmark = NEEDS_SERVERS

pytest.importorskip("PIL")

from lora_pair import img2img, job, tag  # noqa: E402

ONE, TWO = "e2e-one", "e2e-two"
HIRES = {"enable_hr": True, "hr_scale": 1.5, "denoising_strength": 0.6}
JOBS = {
    "Euler a": ("txt2img", job()),
    "DPM++ SDE": ("txt2img", job(sampler_name="DPM++ SDE")),
    "DDIM": ("txt2img", job(sampler_name="DDIM")),
    "UniPC": ("txt2img", job(sampler_name="UniPC")),
    "hires": ("txt2img", job(**HIRES)),
    "batch of 2": ("txt2img", job(batch_size=2)),
    "img2img": ("img2img", img2img()),
}


@pytest.fixture(autouse=True)
def armed(request):
    """Whatever a test has armed is over with it."""
    pair = request.getfixturevalue("pair")
    try:
        pair.ours.get("/webui-fault")
        pair.stock.get("/webui-fault")
    except urllib.error.HTTPError:
        pytest.skip("probe_extension is not installed in both servers")
    yield
    for server in pair.both():
        server.get("/webui-fault")


def arm(server: Any, kind: str, first: int, times: int = 1, place: float = 0.5) -> None:
    server.post("/webui-fault", {"kind": kind, "first": first, "times": times, "place": place})


def tried_again(pair: Any, name: str, what: dict[str, Any], kind: str = "txt2img", error: str = "torch", **where: Any) -> list[str]:
    """Ours with the error, stock without it; then both without."""
    before = pair.ours.status()
    arm(pair.ours, error, **where)
    outcome = pair.run(f"{name}, {error} {where}", what, kind, managed=False)  # with all resident, it is not meant to be
    struck = pair.ours.get("/webui-fault")
    assert struck["struck"] == 1, struck
    after = pair.ours.status()
    assert after["retries"] - before["retries"] == 1 and after["retries_failed"] == before["retries_failed"]
    assert "made by a test" in after["last_error"]
    assert (after["state"], after["allocated_bytes"], after["placement_faults"]) == ("active", 0, 0), after["last_error"]
    pair.run(f"{name}, the next job", what, kind)
    assert pair.ours.status()["retries"] == after["retries"]
    return outcome.pictures


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("error", ["torch", "doggettx"])
def test_at_several_layers(pair, plain, error, place):
    for first in (0, 2):
        assert tried_again(pair, "plain", job(), error=error, first=first, place=place) == plain


@pytest.mark.parametrize("name", list(JOBS))
def test_jobs(pair, name):
    kind, what = JOBS[name]
    tried_again(pair, name, what, kind, first=1, place=0.7)


def test_token_merging(pair, plain):
    """It draws in every pass, from a generator of its own."""
    pair.set_options(token_merging_ratio=0.5)
    try:
        for first in (0, 2):
            assert tried_again(pair, "token merging", job(), first=first) != plain
    finally:
        pair.set_options(token_merging_ratio=0.0)
    assert pair.run("without", job()).pictures == plain


def test_in_a_pass_that_patches(pair, plain):
    """Some layers hold the network already when memory runs out: they are not patched twice, and the others are."""
    for place in (0.2, 0.8):
        applied = tried_again(pair, "LoRA applied", job(tag(ONE)), first=0, place=place)
        assert applied != plain
        exchanged = tried_again(pair, "exchanged", job(tag(TWO, 0.5)), first=0, place=place)
        assert exchanged not in (applied, plain)
        assert tried_again(pair, "removed", job(), first=0, place=place) == plain


@pytest.mark.parametrize("first", [0, 5, 20])
def test_while_a_layer_is_patched(pair, plain, first):
    """The built-in extension swallows that error and goes on with the layer unpatched; here the pass is tried again."""
    if not pair.files[ONE].units["unet"]:
        pytest.skip("nothing of the UNet is patched")
    text = pair.changed_by(ONE)["text"]
    calls = text + first  # the text encoder is patched before: its layers come first
    assert tried_again(pair, "in a layer", job(tag(ONE)), error="lora", first=calls) != plain
    assert pair.run("removed", job()).pictures == plain


def test_one_that_fails_again_fails_as_under_stock(pair, plain):
    before = pair.ours.status()
    errors = []
    for server in pair.both():
        arm(server, "torch", first=1, times=2)
        with pytest.raises(urllib.error.HTTPError) as raised:
            server.pictures("txt2img", job())
        errors.append((raised.value.code, raised.value.read().decode()))
        server.get("/webui-fault")
    print("\n", *errors, sep="\n")
    assert errors[0] == errors[1]
    after = pair.ours.status()
    assert after["retries"] - before["retries"] == 1 and after["retries_failed"] - before["retries_failed"] == 1
    assert after["state"] == "active" and after["allocated_bytes"] == 0
    assert pair.run("the next job", job()).pictures == plain
