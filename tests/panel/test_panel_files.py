"""The panel's files, without a browser: no HTML made from data, one global, texts that localisation files can have, sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from panel_examples import RESULT, active, learning, standing_down, timeline, trial

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "javascript").glob("*.js"))
MOST_LINES = 350


def code_of(path: Path) -> str:
    """Without comments, so that words in them count for nothing."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"(?m)(^|\s)//.*$", "", text)


def test_there_are_scripts():
    assert SCRIPTS and SCRIPTS[0].name == "async_lowvram.js"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script(path):
    text, code = path.read_text(encoding="utf-8"), code_of(path)
    assert path.name.startswith("async_lowvram"), "names of other extensions' scripts are not ours to take"
    assert text.startswith("/*\n * "), "it tells first what it is for"
    assert len(text.splitlines()) <= MOST_LINES
    assert max(map(len, text.splitlines())) <= 140
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "setInterval"):
        assert forbidden not in code, forbidden
    # Everything in a function, but for the one global.
    statements = [line for line in code.splitlines() if line and not line[0].isspace()]
    assert statements == [
        '"use strict";',
        "window.asyncLowvram = window.asyncLowvram || {};",
        "(function(ours) {",
        "})(window.asyncLowvram);",
    ]


def test_texts_are_literals():
    """So that they can be listed: t() is called with a string, or with what the server says (a reason, an advice, a message)."""
    given = set()
    for path in SCRIPTS:
        for match in re.finditer(r"(?<![\w.])(?:ours\.)?t\((?!\")([^,)]*)", code_of(path)):
            given.add(match.group(1))
    served = {"status.reason", "status.advice", "advice.text", "value", "one.text", "restart", "trial.reason", "answer.reason"}
    assert given - {"template"} <= served


def test_styles_stay_with_the_panel():
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "style.css").read_text(encoding="utf-8"), flags=re.S)
    selectors = [one.strip() for one in re.findall(r"([^{}]+)\{", text)]
    strangers = [
        one for one in selectors if not one.startswith("@") and not all(".async-lowvram" in part for part in re.split(r",(?![^(]*\))", one))
    ]
    assert not strangers


@pytest.mark.parametrize(
    "name, answer",
    [
        ("status", active()),
        ("status", learning()),
        ("status", standing_down()),
        ("status", active(trial=trial("done", 1.0, "", RESULT))),
        ("timeline", timeline()),
        ("timeline", {"schema": 1, "network": None, "seconds": 0, "spans": []}),
    ],
)
def test_what_the_tests_serve_is_what_the_server_may_say(name, answer):
    """docs/*.schema.json, which the server's own tests hold its answers against."""
    jsonschema = pytest.importorskip("jsonschema", reason="validates what the schema says")
    schema = json.loads((ROOT / "docs" / f"{name}.schema.json").read_text(encoding="utf-8"))
    problems = jsonschema.Draft202012Validator(schema).iter_errors(answer)
    assert [f"{list(problem.absolute_path)}: {problem.message}" for problem in problems] == []
