"""LoRA through the life of jobs and models in the real WebUI: cut short, switched, unloaded, the extension off and on.

Set up and run as `test_e2e_lora`. Wherever a case says how often units are written back, that is exact; where a model was loaded
in between, weights and LoRA's backups are new, and only pictures are compared.
"""

from __future__ import annotations

import pytest
from lora_fixtures import NEEDS_SERVERS

pytestmark = NEEDS_SERVERS

pytest.importorskip("PIL")

from lora_pair import NETWORKS, NOTHING, img2img, job, tag, total  # noqa: E402
from webui_client import Background  # noqa: E402

ONE, TWO = "e2e-one", "e2e-two"


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_cut_short_then_without(pair, plain, how):
    """In the middle of the first job with it: what is patched by then is restored in the next job, once."""
    pair.cut_short(f"{how} in the first job", job(tag(ONE)), f"/sdapi/v1/{how}")
    removed = pair.run(f"without, after {how}", job())
    assert removed.pictures == plain
    assert removed.write_backs() == pair.changed_by(ONE)
    again = pair.run("without, once more", job(prompt=pair.unheard_of(10)))
    assert again.write_backs() == NOTHING


@pytest.mark.parametrize("how", ["interrupt", "skip"])
def test_cut_short_then_with(pair, plain, how):
    """The next job with the same one finds it in place; one with another exchanges it."""
    pair.cut_short(f"{how} in the first job", job(tag(ONE)), f"/sdapi/v1/{how}")
    same = pair.run(f"the same, after {how}", job(tag(ONE)))
    assert same.pictures != plain
    assert same.write_backs() == NOTHING
    pair.cut_short(f"{how} in a change", job(tag(TWO)), f"/sdapi/v1/{how}")
    third = pair.run(f"a third, after {how}", job(tag("e2e-norms")))
    assert third.write_backs() == pair.changed_by(TWO, "e2e-norms")
    assert pair.run("removed", job()).pictures == plain


def test_img2img(pair, plain):
    patched = pair.run("img2img, plain", img2img(), "img2img")
    outcome = pair.run("img2img with it", img2img(tag(ONE)), "img2img")
    assert outcome.pictures != patched.pictures
    assert outcome.write_backs() == pair.changed_by(ONE)
    assert pair.run("img2img without", img2img(), "img2img").pictures == patched.pictures


def test_batches(pair, plain):
    """A network named in a prompt is active for its whole batch, whatever prompt editing says."""
    batches = pair.run("2 x 2", job(tag(ONE), batch_size=2, n_iter=2))
    assert len(batches.pictures) == 4
    assert batches.write_backs() == pair.changed_by(ONE)
    edited = pair.run("inside prompt editing", job(prompt=f"a [lighthouse{tag(ONE)}:rock:0.5]", steps=4))
    assert edited.write_backs() == NOTHING
    assert pair.run("removed", job()).pictures == plain


def test_another_in_each_batch(pair, plain):
    """The prompt matrix makes one job of four batches: none, the first, the second, both."""
    matrix = job(prompt=f"a lighthouse|{tag(ONE)}|{tag(TWO)}", script_name="prompt matrix")
    outcome = pair.run("prompt matrix", {**matrix, "script_args": [False, False, "positive", "comma", 0]})
    assert len(set(outcome.pictures)) == 5  # and the grid
    both = pair.changed_by(ONE, TWO)
    expected = total(pair.changed_by(ONE), both, both)
    assert outcome.write_backs() == expected
    assert pair.run("removed", job()).pictures == plain


def test_refiner(pair, plain):
    """The model changes in the middle of sampling, and LoRA with it."""
    if not pair.others:
        pytest.skip("the WebUI has one checkpoint only")
    for refiner in pair.others:
        what = job(tag(ONE), steps=4, refiner_checkpoint=refiner, refiner_switch_at=0.5)
        first = pair.run(f"refiner {refiner}", what, rebuilt=True)
        again = pair.run(f"refiner {refiner}, again", what, rebuilt=True)
        assert again.pictures == first.pictures
        assert pair.run("with it, no refiner", job(tag(ONE)), rebuilt=True).pictures not in (plain, first.pictures)
        pair.set_options(sd_model_checkpoint=pair.checkpoint)
        assert pair.run("removed, no refiner", job()).pictures == plain


def test_checkpoint_switch(pair, plain):
    """In place, and to another architecture: the backups are of weights that are gone."""
    if not pair.others:
        pytest.skip("the WebUI has one checkpoint only")
    patched = pair.run("with it", job(tag(ONE))).pictures
    for title in pair.others:
        pair.set_options(sd_model_checkpoint=title)
        there = pair.run(f"with it on {title}", job(tag(ONE))).pictures
        assert there != patched
        without = pair.run(f"without on {title}", job()).pictures
        assert without != plain
        assert without != there or title not in pair.same_config
        pair.run(f"with it on {title}, again", job(tag(ONE)))
        pair.set_options(sd_model_checkpoint=pair.checkpoint)
        assert pair.run("with it, back", job(tag(ONE))).pictures == patched
        pair.set_options(sd_model_checkpoint=title)
        pair.set_options(sd_model_checkpoint=pair.checkpoint)
        assert pair.run("without, after there and back", job()).pictures == plain
        assert pair.run("with it once more", job(tag(ONE))).pictures == patched
    assert pair.run("removed", job()).pictures == plain


def test_switched_off_and_on(pair, plain):
    """The extension goes and comes between jobs while patches are in place: they are in the masters."""
    patched = pair.run("with it", job(tag(ONE))).pictures
    pair.ours.set_options(async_lowvram_enabled=False)
    assert pair.run("off, with it", job(tag(ONE)), managed=False).pictures == patched
    assert pair.ours.status()["state"] == "standing_down"
    assert pair.run("off, without", job(), managed=False).pictures == plain
    pair.run("off, another", job(tag(TWO)), managed=False)
    pair.ours.set_options(async_lowvram_enabled=True)
    assert pair.run("on, with it", job(tag(ONE)), managed=False).pictures == patched  # learns
    assert pair.run("on, without", job()).pictures == plain
    pair.ours.set_options(async_lowvram_enabled=False)
    pair.run("off, with it again", job(tag(ONE)), managed=False)
    pair.ours.set_options(async_lowvram_enabled=True)
    assert pair.run("on, without at once", job(), managed=False).pictures == plain
    again = pair.run("on, with it again", job(tag(ONE)))
    assert again.pictures == patched
    assert again.write_backs() == pair.changed_by(ONE)


def test_unloaded_and_reloaded(pair, plain):
    """Through the API, between jobs: the model goes to the host and comes back with its patches."""
    patched = pair.run("with it", job(tag(ONE))).pictures
    pair.post("/sdapi/v1/unload-checkpoint")
    pair.post("/sdapi/v1/reload-checkpoint")
    assert pair.run("with it, after reload", job(tag(ONE))).pictures == patched
    pair.post("/sdapi/v1/unload-checkpoint")
    assert pair.run("without, after unload", job()).pictures == plain
    pair.post("/sdapi/v1/unload-checkpoint")
    pair.post("/sdapi/v1/reload-checkpoint")
    assert pair.run("with it, after reload", job(tag(ONE))).pictures == patched


def test_unloaded_during_a_job(pair, plain):
    """Through the API, from other threads, in the middle of the first job with it; stock gets the job alone."""
    what = job(tag(ONE), steps=10)
    running = Background(pair.ours, "txt2img", what)
    pair.ours.wait_for_step(2, running.thread)
    pair.ours.post("/sdapi/v1/unload-checkpoint", {})
    pair.ours.post("/sdapi/v1/reload-checkpoint", {})
    got, wanted = running.result(), pair.stock.pictures("txt2img", what)
    pair.report("unload and reload during the job", got, wanted, {})
    assert got == wanted
    removed = pair.run("removed", job())
    assert removed.pictures == plain
    assert set(removed.grew) >= set(NETWORKS)
