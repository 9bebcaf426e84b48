"""The panel in the languages that localizations/ has: nothing is left in English but names, units and what the server filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from panel_examples import RESULT, active, learning, standing_down, timeline, trial

LOCALIZATIONS = Path(__file__).resolve().parents[2] / "localizations"
each_language = pytest.mark.parametrize("language", ["ja_JP", "ko_KR", "zh_CN"])

UNPINNED = "{mb} MB of weights could not be locked in main memory and travel more slowly: {how}."
HOW = "raise “Pinned memory limit”"

NAMES = set(
    """Async LowVRAM VRAM GPU UNet WebUI MB GB ms it lowvram medvram HTTP PM AM
    NVIDIA GeForce GTX unet vae input blocks in layers batch x512""".split()
)
"""Names and units, and what the server says as it is: a device, units, a shape."""

SAID = """() => {
    const root = document.querySelector("#async_lowvram"), walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), found = [];
    while (walk.nextNode()) if (walk.currentNode.parentElement.localName !== "textarea") found.push(walk.currentNode.data.trim());
    for (const one of root.querySelectorAll("*")) {
        for (const name of ["title", "aria-label", "aria-valuetext", "aria-roledescription"]) found.push(one.getAttribute(name) || "");
    }
    return found.filter(Boolean);
}"""


def texts_of(language):
    return json.loads((LOCALIZATIONS / f"{language}.json").read_text(encoding="utf-8"))


def said(panel):
    return panel.page.evaluate(SAID)


def english(texts):
    """Words that are neither names nor units."""
    return {text for text in texts if set(re.findall(r"[A-Za-z][A-Za-z0-9]+", text)) - NAMES}


@each_language
def test_all_of_the_open_panel(visit, answers, language):
    answers.localization = texts_of(language)
    answers.timeline = timeline()
    advices = [{"id": "unpinned", "text": UNPINNED, "values": {"mb": 120, "how": HOW}}]
    disk = {"read_bytes": 1 << 30, "bytes_per_s": 2e9}
    answers.status = active(advices=advices, messages=[], disk=disk, trial=trial("done", 1.0, "", RESULT))
    panel = visit()
    panel.open()
    panel.settle()
    panel.wait_until("() => document.querySelector('#async_lowvram .alv-readout').textContent")
    assert len(said(panel)) > 60
    assert not english(said(panel))


def test_the_check_sees_english(visit, answers):
    panel = visit()
    panel.open()
    assert {"Details", "Weights in main memory"} <= english(said(panel))


@each_language
@pytest.mark.parametrize(
    "status",
    [
        learning(),
        learning(generating=True),
        standing_down(reason="switched off in Settings"),
        standing_down(reason="the WebUI was started without --lowvram or --medvram"),
        active(trial=trial("running", 0.5)),
        active(trial=trial("failed", 0.5, "it failed"), messages=[], advices=[], advice=""),
        404,
        500,
    ],
    ids=["ready", "learning", "off", "no --lowvram", "trial", "trial failed", "missing", "unreachable"],
)
def test_every_state(visit, answers, language, status):
    answers.localization = texts_of(language)
    answers.status = status if isinstance(status, int) else {**status, "advices": [], "advice": "", "messages": []}
    panel = visit()
    panel.open()
    panel.settle()
    assert panel.text(".alv-state")
    assert not english(said(panel))


@each_language
def test_values_of_an_advice_are_translated_before_they_are_filled_in(visit, answers, language):
    texts = answers.localization = texts_of(language)
    answers.status = active(advices=[{"id": "unpinned", "text": UNPINNED, "values": {"mb": 120, "how": HOW}}])
    panel = visit()
    panel.open()
    expected = texts[UNPINNED].replace("{mb}", "120").replace("{how}", texts[HOW])
    assert panel.texts(".alv-advice li") == [" ".join(expected.split())]
    assert HOW not in expected


def test_single_words_have_keys_of_their_own(visit, answers):
    """Files of other extensions have "Details" and "copy", and the WebUI merges all of one language."""
    answers.localization = {"Details": "theirs", "Async LowVRAM: Details": "ours", "Device": "theirs", "Async LowVRAM: Device": ""}
    panel = visit()
    assert panel.text(".alv-toggle") == "ours"
    panel.open()
    assert panel.text("[data-fact=device] dt") == "theirs", "better than English"
