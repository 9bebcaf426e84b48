"""localizations/*.json have every text that a user reads, no other, and nothing that a template would choke on."""

from __future__ import annotations

import json
import re

import pytest
from localized_texts import OWN, ROOT, all_texts, large_texts, panel_texts, plot_texts, reasons, server_texts, settings_texts

from lib_async_lowvram.webui import advice, settings

LANGUAGES = ("ja_JP", "ko_KR", "zh_CN")
"""Named as the WebUI's common localisation extensions are: it merges files of one name."""

SAME = {"Async LowVRAM", "x", "y", "{n} MB", "{n} GB", "{n} ms", "{n} s", "{n} MB/s", "{n} GB/s", "{n} it/s", "{n} s/it"}
"""Names and units, which may stay as they are."""

SCRIPT = {"ja_JP": "\u3040-\u30ff\u4e00-\u9fff", "ko_KR": "\uac00-\ud7af", "zh_CN": "\u4e00-\u9fff"}
"""Letters of the language, as a range of a regular expression."""

TERMS = "LoRA|UNet|WebUI|GPU|CPU|CUDA|ROCm|ZLUDA|--lowvram|--medvram|Async LowVRAM|WSL|.safetensors| MB| ms| GB/s".split("|")
"""What is the same in every language."""

each_language = pytest.mark.parametrize("language", LANGUAGES)


def pairs_of(language: str) -> list[tuple[str, str]]:
    text = (ROOT / "localizations" / f"{language}.json").read_bytes().decode("utf-8")
    return json.loads(text, object_pairs_hook=list)


def placeholders(text: str) -> list[str]:
    return sorted(re.findall(r"\{(\w+)\}", text))


def test_texts_are_found_where_they_are():
    """One that is known to be there for each way of collecting; an empty collection would make every file right."""
    assert {
        "On: weights travel while the GPU computes",
        "{n} stalls, longest {time} at {name}",
        OWN + "Details",
        OWN + "Try it",
    } <= panel_texts()
    assert "no reason given" in panel_texts() and "GPU waits per step" in panel_texts()
    assert {advice.TEXTS["more_budget"], advice.PIN_HOW["limit"]} <= server_texts()
    assert {"switched off in Settings", "no model is loaded yet", "the WebUI was started without --lowvram or --medvram"} <= reasons()
    assert {"log in first", "a trial is under way already", "the model is gone", "this model is left to the WebUI"} <= reasons()
    assert not any(re.search(r"%s|\n|^\W|^(trial|setting)\b", text) for text in reasons()), "a line for the log, or part of one"
    assert {"Large pictures", "Automatic", "Tile (pixels)", "0: automatic", "negative"} <= large_texts()
    assert {"[Async LowVRAM] budget (MB)", "[Large pictures] tile"} <= plot_texts()
    assert len(settings_texts()) == 1 + 2 * len(settings._OPTIONS)


def test_the_hosts_page_has_the_text_in_parentheses(webui):
    """`OptionInfo.info` of the host adds them, and localization.js looks up all that is in the element."""
    settings.register()
    for option in webui.shared.opts.data_labels.values():
        assert {option.label, option.comment_after} <= settings_texts()


def test_there_are_no_other_files():
    assert sorted(path.name for path in (ROOT / "localizations").iterdir()) == [f"{language}.json" for language in LANGUAGES]


@each_language
def test_every_text_and_no_other(language):
    keys = [key for key, _ in pairs_of(language)]
    assert sorted(keys) == sorted(set(keys)), "the same key twice"
    missing, stale = all_texts() - set(keys), set(keys) - all_texts()
    assert not missing and not stale


@each_language
def test_the_host_looks_all_of_them_up(language):
    """localization.js leaves out what is only digits or has an emoji, and takes off spaces before it looks."""
    for key, _ in pairs_of(language):
        assert key == key.strip() and not re.fullmatch(r"[.\d]+", key)
        assert not re.search("[\u00a9\u00ae\u2122\u2139-\u21aa\u231a-\u27bf\u2b05-\u2b55\U0001f000-\U0001faff]", key), key


@each_language
def test_translations(language):
    for key, value in pairs_of(language):
        assert isinstance(value, str) and value == value.strip() and value, key
        assert placeholders(value) == placeholders(key), key
        assert value.count("{") == value.count("}") == len(placeholders(key)), key
        if key in SAME:
            continue
        assert value != key and re.search(f"[{SCRIPT[language]}]", value), key


@each_language
def test_names_of_settings_are_those_that_the_page_shows(language):
    """A sentence that names a setting or a button in quotes has the name that it has in the same language."""
    translated = dict(pairs_of(language))

    def named(text: str) -> str:
        return text.removeprefix(OWN).removesuffix(" (MB)")

    known = {named(key): named(value) for key, value in translated.items()}
    for key, value in translated.items():
        for quoted in re.findall("“([^”]+)”", key):
            if quoted in known:
                assert re.search(f"[“「]{re.escape(known[quoted])}[”」]", value), key


@each_language
def test_terms_stay(language):
    """Names of things that nobody translates are there where they are in English, and units keep their figures."""
    for key, value in pairs_of(language):
        for term in TERMS:
            if term in key.removeprefix(OWN):
                assert term in value, (key, term)
        for figure in re.findall(r"\d+", key):
            assert figure in value or figure == "1", (key, figure)
