"""Every text of ours that a user reads in the page, collected from the sources: the keys that localisation files must have.

Problem: the WebUI (and the panel's own t()) looks a translation up by the English text, so a text that is changed loses its translation
without anybody noticing. So nothing is listed by hand: the panel's texts are read out of the scripts, sentences of the server and of the
console's reasons out of Python's own values and syntax trees.

Not among them, and shown in English: texts with values in them that the server fills in (a fault's name, a foreign version), the console's
messages, the report. Called by test_localizations.py; imports no host.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from lib_async_lowvram.large.settings import MODES
from lib_async_lowvram.webui import advice, freshness, large_ui, plot, settings
from lib_async_lowvram.webui.announcement import SWITCHED_OFF

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "javascript").glob("*.js"))
WEBUI = ROOT / "lib_async_lowvram" / "webui"

REASONS = ("host", "answers", "trial", "trial_pictures", "routes")
"""Modules whose functions answer with sentences that the panel shows: why it stands down, why no trial is made."""

OWN = "Async LowVRAM: "
"""What keys for the panel's shortest texts begin with: "copy", "Details" and "Live previews" are elsewhere in the page and in other
localisation files, too, with meanings of their own, and the WebUI merges all of one language. The panel looks for these first."""

OWN_WORDS = 2

_STRING = r'"(?:[^"\\\n]|\\.)*"'


def code_of(path: Path) -> str:
    """A script without its comments."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)
    return re.sub(r"(?m)(^|\s)//.*$", "", text)


def panel_texts() -> set[str]:
    """Keys for what t() is called with. ValueError where its text is put together from several."""
    found = set()
    for path in SCRIPTS:
        for match in re.finditer(rf"(?<![\w.$])(?:ours\.)?t\(\s*({_STRING})\s*(.)", code_of(path)):
            if match.group(2) not in ",)":
                raise ValueError(f"{path.name}: no text of its own: {match.group()}")
            text = json.loads(match.group(1))
            is_short = len(text.split()) <= OWN_WORDS and "{" not in text
            found.add(OWN + text if is_short else text)
    return found


def server_texts() -> set[str]:
    """Advice, and what is filled into it."""
    return {*advice.TEXTS.values(), *advice.PIN_HOW.values(), freshness.ADVICE}


def reasons() -> set[str]:
    """Whole sentences within functions of `REASONS`, but for what goes to the log, and why the extension's script starts nothing."""
    script = ast.parse((ROOT / "scripts" / "async_lowvram.py").read_text(encoding="utf-8"))
    old = {node.value.value for node in script.body if isinstance(node, ast.Assign) and node.targets[0].id == "OLD"}
    trees = [ast.parse((WEBUI / f"{name}.py").read_text(encoding="utf-8")) for name in REASONS]
    found = (text for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for text in _sentences(node))
    return {SWITCHED_OFF, *old, *found}


def _sentences(function: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(function):
        is_log = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "logger"
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_log or is_docstring or isinstance(node, ast.JoinedStr):
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
        yield from _sentences(node)


def settings_texts() -> set[str]:
    """As the host's page shows them: `OptionInfo.info` puts its text in parentheses, in an element of its own."""
    options = settings._OPTIONS.values()
    return {settings.SECTION[1], *(label for label, *_ in options), *(f"({info})" for *_, info in options)}


def large_texts() -> set[str]:
    """The accordion's title, labels, infos, choices and columns."""
    tree = ast.parse((WEBUI / "large_ui.py").read_text(encoding="utf-8"))
    named = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg in ("label", "info")]
    return {large_ui.TITLE, *MODES, *large_ui.COLUMNS, *(ast.literal_eval(node.value) for node in named)}


def plot_texts() -> set[str]:
    """The axes' names in the X/Y/Z plot."""
    added: list[str] = []

    class Plot:
        axis_options: list = []

        class AxisOption:
            def __init__(self, label: str, *given: object, **more: object) -> None:
                self.label = label
                added.append(label)

    class Loaded:
        path, module = plot.PLOT, Plot

    for add in (plot.add_axes, large_ui.add_axes):
        add([Loaded])
    return set(added)


def all_texts() -> set[str]:
    return panel_texts() | server_texts() | reasons() | settings_texts() | large_texts() | plot_texts()
