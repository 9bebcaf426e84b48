"""LoRA in the real WebUI: with the extension and without it the same pictures, and no write-back that is not needed.

    SD_WEBUI_URL        a WebUI with the extension (--lowvram --api)
    SD_WEBUI_STOCK_URL  the same WebUI, checkpoint and settings without it
    SD_WEBUI_LORA_DIR   the folder in which both look for Lora files; this writes into it

As in `test_e2e`; on a machine without a GPU both servers run with `--use-cpu all`. Every case runs twice: under a quarter of
the UNet (weights stream) and under the automatic budget (all resident). Run with `-s` to see the pairs of hashes and counters.

What stock itself cannot run: the second pass after a network has given a bias to layers without one, and with it any change of
its strength, raises "no backup bias found and current bias are not unchanged". So does the extension's server; see
`test_biases`.
"""

from __future__ import annotations

import urllib.error

import pytest
from lora_fixtures import NEEDS_SERVERS

pytestmark = NEEDS_SERVERS

pytest.importorskip("PIL")

from lora_pair import NOTHING, job, tag, tags, total  # noqa: E402

ONE, TWO = "e2e-one", "e2e-two"


@pytest.mark.parametrize("name", [ONE, TWO, "e2e-unet", "e2e-text", "e2e-norms"])
def test_apply_keep_and_remove(pair, plain, name):
    """Written back once when it comes and once when it goes; in between nothing, whatever is encoded or computed."""
    changed = pair.changed_by(name)
    first = pair.run(f"{name} applied", job(tag(name)))
    assert first.pictures != plain
    assert first.write_backs() == changed
    again = pair.run(f"{name}, the same again", job(tag(name)))
    assert again.pictures == first.pictures
    assert again.write_backs() == NOTHING
    longer = pair.run(f"{name}, another prompt, more steps", job(tag(name), prompt=pair.unheard_of(1), steps=6))
    assert longer.write_backs() == NOTHING
    assert longer.grew["text"]["passes"] > 0
    removed = pair.run(f"{name} removed", job())
    assert removed.pictures == plain
    assert removed.write_backs() == changed
    clean = pair.run(f"{name} gone, another prompt", job(prompt=pair.unheard_of(2)))
    assert clean.write_backs() == NOTHING


def test_strength(pair, plain):
    changed = pair.changed_by(ONE)
    pictures = [plain]
    for strength in (1, 0.4, -0.5, "1:0.3"):  # the last: of the text encoder, then of the UNet
        outcome = pair.run(f"strength {strength}", job(tag(ONE, strength)))
        assert outcome.pictures not in pictures
        assert outcome.write_backs() == changed
        pictures.append(outcome.pictures)
    removed = pair.run("removed", job())
    assert removed.pictures == plain
    assert removed.write_backs() == changed


def test_several(pair, plain):
    """A change writes back what had a patch or gets one."""
    both = pair.run("two at once", job(tags([ONE, TWO])))
    assert both.write_backs() == pair.changed_by(ONE, TWO)
    other_order = pair.run("in another order", job(tags([TWO, ONE])))
    assert other_order.write_backs() == pair.changed_by(ONE, TWO)
    second = pair.run("the second stays", job(tag(TWO)))
    assert second.write_backs() == pair.changed_by(ONE, TWO)
    exchanged = pair.run("exchanged for three others", job(tags(["e2e-unet", "e2e-text", "e2e-norms"])))
    assert exchanged.write_backs() == pair.changed_by(TWO, "e2e-unet", "e2e-text", "e2e-norms")
    removed = pair.run("removed", job())
    assert removed.pictures == plain
    assert removed.write_backs() == pair.changed_by("e2e-unet", "e2e-text", "e2e-norms")


def test_strength_none(pair, plain):
    """At strength 0 it is applied all the same, and the picture is the plain one."""
    outcome = pair.run("strength 0", job(tag(ONE, 0)))
    assert outcome.pictures == plain
    assert outcome.write_backs() == pair.changed_by(ONE)


def test_biases(pair):
    """Layers get a bias, and lose it again: other Parameters than before, so these units are packed anew each time. Of what was
    packed anew it is not known that it holds its backup: the next change restores it once more, and from then on it is known."""
    added = pair.files["e2e-bias"].biases
    assert added
    plain = pair.run("one pass, without", job(steps=1))
    bias = pair.run("one pass, biases added", job(tag("e2e-bias"), steps=1))
    assert bias.pictures != plain.pictures
    assert (bias.grew["unet"]["adopted"], bias.grew["unet"]["write_backs"]) == (added, 0)
    removed = pair.run("one pass, biases removed", job(steps=1))
    assert removed.pictures == plain.pictures
    assert (removed.grew["unet"]["adopted"], removed.grew["unet"]["write_backs"]) == (added, 0)
    another = pair.run("one pass, another", job(tag("e2e-norms"), steps=1))
    assert another.write_backs() == pair.changed_by("e2e-norms", "e2e-bias")
    gone = pair.run("one pass, that one removed", job(steps=1))
    assert gone.pictures == plain.pictures
    assert gone.write_backs() == pair.changed_by("e2e-norms")


def test_biases_in_a_second_pass(pair, plain):
    """Stock raises in the second pass. So do we, from the same place; and both recover."""
    added = pair.files["e2e-bias"].biases
    before = pair.ours.status()["networks"]["unet"]["adopted"]
    for server in pair.both():
        with pytest.raises(urllib.error.HTTPError) as raised:
            server.pictures("txt2img", job(tag("e2e-bias")))
        assert "no backup bias found and current bias are not unchanged" in raised.value.read().decode()
    assert pair.ours.status()["networks"]["unet"]["adopted"] - before == added
    recovered = pair.run("after the error, removed", job())
    assert recovered.pictures == plain
    assert recovered.grew["unet"]["adopted"] == added
    another = pair.run("after the error, another", job(tag("e2e-norms")))
    assert another.write_backs() == pair.changed_by("e2e-norms", "e2e-bias")


def test_functional(pair, plain):
    """`lora_functional` computes beside the layers; what was written before is restored once, then nothing is written.
    `MultiheadAttention` (open_clip) knows no such way: it stays patched."""
    linear = pair.changed_by(ONE, but=".attn")
    attention = {name: count - linear[name] for name, count in pair.changed_by(ONE).items()}
    written = pair.run("as weights", job(tag(ONE)))
    pair.set_options(lora_functional=True)
    beside = pair.run("functional", job(tag(ONE), prompt=pair.unheard_of(3)))
    assert beside.write_backs() == linear
    beside = pair.run("functional, again", job(tag(ONE), prompt=pair.unheard_of(4)))
    assert beside.write_backs() == NOTHING
    without = pair.run("functional, without", job())
    assert without.pictures == plain
    assert without.write_backs() == attention
    pair.set_options(lora_functional=False)
    back = pair.run("as weights again", job(tag(ONE)))
    assert back.pictures == written.pictures
    assert back.write_backs() == pair.changed_by(ONE)


def test_hires_with_another(pair, plain):
    """Two networks by turns in one job: the first for its first pass, the other for the second."""
    hires = {"enable_hr": True, "hr_upscaler": "Latent", "hr_scale": 1.5, "hr_second_pass_steps": 2, "denoising_strength": 0.6}
    prompt = pair.unheard_of(20 if pair.streamed else 21)  # the host keeps what it encoded for hires, too
    outcome = pair.run("hires with another", job(tag(ONE), prompt=prompt, hr_prompt=prompt + tag(TWO), **hires))
    assert outcome.write_backs() == total(pair.changed_by(ONE), pair.changed_by(ONE, TWO))
    # Both prompts were encoded before the first pass (as --lowvram wants it), so the text encoder is left with the other's.
    again = pair.run("hires with the same", job(tag(TWO), prompt=prompt, hr_prompt=prompt + tag(TWO), **hires))
    assert again.write_backs() == NOTHING
    assert pair.run("removed", job()).pictures == plain
