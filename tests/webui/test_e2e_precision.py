"""Weights stored in other formats: fp8, with LoRA and without, with the fp16 weights kept beside and without; and a VAE that is
turned to bfloat16 in the middle of a job, because what it decoded was not a number.

Works with whatever flags the servers were started with (`--opt-channelslast`, without `--no-half` ...): what one of them
refuses, both must refuse. The last test leaves both servers with a bfloat16 VAE until they are restarted: so does the host.
"""

# ruff: noqa: F811 - the fixtures are imported

from __future__ import annotations

import urllib.error

import make_fixtures
import pytest
from pair_fixtures import JOB, QUARTER_AND_AUTOMATIC, img2img, needs_servers, pair, servers  # noqa: F401

pytestmark = needs_servers

# Without live previews: on a CPU fp8 means autocast to bfloat16, and there the host's inline preview ends the job in an exception.
NO_PREVIEWS = {"live_previews_enable": False}
FP8 = [{"fp8_storage": "Enable", "cache_fp16_weight": kept, **NO_PREVIEWS} for kept in (False, True)]


@pytest.fixture
def lora(pair):
    for folder in pair.folders("lora_dir"):
        make_fixtures.write_lora(folder, make_fixtures.Checkpoint(pair.checkpoint()))
    pair.both("/sdapi/v1/refresh-loras", {})
    return {**JOB, "prompt": f"{JOB['prompt']} <lora:{make_fixtures.LORA}:1>"}


def runs(pair, name):
    """Whether stock can make a picture now; ours must then, and must not otherwise."""
    outcomes = []
    for server in pair.servers:
        try:
            outcomes.append(server.pictures("txt2img", JOB))
        except urllib.error.HTTPError as error:
            outcomes.append((error.code, error.read().decode()[:200]))
    print(f"\n{pair.budget} | {name} | ours {outcomes[0]} | stock {outcomes[1]}")
    assert outcomes[0] == outcomes[1]
    return isinstance(outcomes[1], list)


@QUARTER_AND_AUTOMATIC
@pytest.mark.parametrize("how", FP8, ids=["", "fp16 weights kept"])
def test_fp8_on_and_off(pair, how):
    plain = pair.same("no fp8")
    with pair.options(**how):
        if not runs(pair, f"{how}"):
            pytest.skip("stock cannot run fp8 here")
        assert pair.same("fp8", expect=None) != plain
        pair.same("fp8 again")
        pair.same("fp8, img2img", img2img(), "img2img", expect=None)
        pair.same("fp8, img2img again", img2img(), "img2img")
    pair.same("fp8 off again", expect=None)  # not as before: the host loads the checkpoint through fp16 now
    pair.same("and again")


@QUARTER_AND_AUTOMATIC
@pytest.mark.parametrize("how", FP8, ids=["", "fp16 weights kept"])
def test_lora_under_fp8(pair, lora, how):
    pair.same("no fp8, no LoRA")
    with pair.options(**how):
        if not runs(pair, f"{how}"):
            pytest.skip("stock cannot run fp8 here")
        without = pair.same("fp8, no LoRA", expect=None)
        written = {"write_backs": lambda grown: grown > 0}
        assert pair.same("fp8, LoRA", lora, expect=written) != without
        pair.same("fp8, LoRA again", lora)
        assert pair.same("fp8, LoRA gone", expect=written) == without
        pair.same("fp8, LoRA once more", lora, expect=written)
    pair.same("LoRA, fp8 gone", lora, expect=None)
    pair.same("neither", expect=None)


def test_vae_decodes_to_not_a_number(pair):
    """Stock turns the VAE to bfloat16 in place and decodes once more. From then on every VAE is bfloat16."""
    checkpoint = make_fixtures.Checkpoint(pair.checkpoint())
    for folder in pair.folders("models_dir"):
        (folder / "VAE").mkdir(exist_ok=True)
        make_fixtures.write_nan_vae(folder / "VAE", checkpoint)
    pair.both("/sdapi/v1/refresh-vae", {})
    assert make_fixtures.NAN_VAE in [vae["model_name"] for vae in pair.ours.get("/sdapi/v1/sd-vae")]
    plain = pair.same("the checkpoint's VAE")
    with pair.options(auto_vae_precision_bfloat16=True), pair.options(sd_vae=make_fixtures.NAN_VAE):
        changed = pair.same("a VAE that decodes to NaN in float32", expect={"adopted": lambda grown: grown > 0})
        pair.same("the next one")
        pair.same("and img2img", img2img(), "img2img", expect=None)
        assert changed != plain
    half = pair.same("the checkpoint's VAE, in bfloat16 now", expect=None)
    assert half != plain
    pair.same("again")
    pair.same("img2img in bfloat16", img2img(), "img2img", expect=None)
    pair.same("img2img in bfloat16 again", img2img(), "img2img")
