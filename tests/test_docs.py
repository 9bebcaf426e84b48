"""What the documentation says is so: its Python runs, its commands parse, messages it quotes are the program's, links lead somewhere.

Read from README.md and docs/*.md, so that a text that goes stale fails here; and from the sources, so that a warning, a refusal or a reason
for standing down without an entry in docs/faq.md fails as well. The diffusers example has a test of its own
(tests/standalone/test_library_example.py).
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lib_async_lowvram import OffloadConfig, __version__
from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench import render, results
from lib_async_lowvram.bench.shapes import sdxl_shape
from lib_async_lowvram.log import PREFIX
from lib_async_lowvram.webui import announcement, settings
from lib_async_lowvram.webui.host import Host
from tests.commands import headers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lib_async_lowvram"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MESSAGES = [ROOT / "README.md", ROOT / "docs" / "faq.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, kind: str) -> list[str]:
    return [text for name, text in FENCE.findall(read(page)) if name == kind]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -- Python ----------------------------------------------------------------------------------------------------------------------
LIBRARY = ROOT / "docs" / "library.md"


@pytest.mark.parametrize("number", range(len(blocks(LIBRARY, "python"))))
def test_python_in_the_library_page_runs(number: int) -> None:
    """Each block by itself, in a process of its own, as somebody would who copies it."""
    code = blocks(LIBRARY, "python")[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_json_can_be_read(page: Path) -> None:
    for text in blocks(page, "json"):
        json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_is_in_pages_that_are_run(page: Path) -> None:
    assert page == LIBRARY or not blocks(page, "python"), "put it into docs/library.md, whose code a test runs"


# -- commands --------------------------------------------------------------------------------------------------------------------
COMMAND = re.compile(r"(?:^|[`$ ])python(?:3|\.exe)? -m (lib_async_lowvram|tests[.\w]*)((?: [^`\n]*)?)", re.MULTILINE)
"""What follows is the command's arguments, until the line's or the quote's end."""


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of every `python -m ...` of ours."""
    for module, rest in COMMAND.findall(read(page)):
        words = shlex.split(rest, comments=True)
        for end in (">", "|", "&&", ";"):
            words = words[: words.index(end)] if end in words else words
        yield module, words


def parses(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the command line takes them; what they ask for is not done."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: object) -> argparse.Namespace:
        options = parse(parser, *given)
        options.run, options.needs = (lambda options: None), (lambda options: ())
        return options

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    try:
        main(arguments)
    except SystemExit as left:
        return left.code == 0
    return True


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for module, words in commands(page):
        if module == "lib_async_lowvram":
            assert parses(words or ["--help"], monkeypatch), f"{page.name}: {module} {' '.join(words)}"
        else:
            path = ROOT.joinpath(*module.split("."))
            path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
            assert path.is_file() and '__name__ == "__main__"' in read(path), f"{page.name}: {module}"
    capsys.readouterr()


def test_there_are_commands_and_wrong_ones_are_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The judge itself."""
    assert sum(1 for page in PAGES for _ in commands(page)) > 20
    assert not parses(["plan", "--no-such-option"], monkeypatch)
    assert not parses(["paln"], monkeypatch)
    capsys.readouterr()


TARGET = re.compile(r"^make (\w+)|`make (\w+)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_has_the_targets(page: Path) -> None:
    targets = set(re.findall(r"^(\w+):", read(ROOT / "Makefile"), re.MULTILINE))
    assert {one or other for one, other in TARGET.findall(read(page))} <= targets


def test_what_plan_prints_is_what_the_page_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    quoted = next(text for text in blocks(ROOT / "docs" / "command-line.md", "") if text.startswith("$ python -m lib_async_lowvram plan"))
    command, expected = quoted.split("\n", 1)
    headers.write(tmp_path / "sdxl.safetensors", headers.ldm(sdxl_shape()))
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[4:]) == 0
    assert capsys.readouterr().out.strip() == expected.strip()


# -- measurements ----------------------------------------------------------------------------------------------------------------
MEASURED = [path for path in sorted((ROOT / "docs" / "results").glob("*.json")) if json.loads(read(path)).get("kind") == results.KIND]


@pytest.mark.parametrize("path", MEASURED, ids=named)
def test_tables_of_measurements_are_those_of_the_files_beside_them(path: Path) -> None:
    page = read(ROOT / "docs" / "benchmarks.md").splitlines()
    rows = [line for line in render.markdown(results.read(path)).splitlines() if line.startswith("| ")]
    assert rows and not [row for row in rows if row not in page]


# -- links -----------------------------------------------------------------------------------------------------------------------
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = FENCE.sub("", read(page))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", read(page))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


# -- messages --------------------------------------------------------------------------------------------------------------------
OTHERS = {"bench", "commands", "standalone"}
"""What the WebUI never runs."""
LEVELS = {"warning", "error", "exception", "critical"}
ANYTHING = re.compile(r"%[-\d.]*[a-z]|\{[^{}]*\}|\.\.\.")
"""In a message: what is filled in. (In the pages' quotes it is three dots.)"""


def template(node: ast.expr) -> str | None:
    """A string of the source, with three dots for what is filled in; None where it is made elsewhere."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return ANYTHING.sub("...", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(each.value if isinstance(each, ast.Constant) else "..." for each in node.values)
    return None


def sources() -> Iterator[tuple[Path, ast.AST]]:
    for path in [*sorted(PACKAGE.rglob("*.py")), ROOT / "scripts" / "async_lowvram.py", ROOT / "install.py"]:
        if not (path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] in OTHERS):
            yield path, ast.parse(read(path))


def spoken() -> dict[str, str]:
    """{message: where} of every warning and error in the log, every reason for standing down, and every refusal of a network."""
    found: dict[str, str] = {}
    for path, tree in sources():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            if called in {f"logger.{level}" for level in LEVELS} | {"_Unusable", "StandDown", "self._tell", "_say"}:
                text = template(node.args[-1] if called == "_say" else node.args[0])
                if text is not None and pieces(text):
                    found[text] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def pieces(message: str) -> list[str]:
    """What of a message is always there; a word alone says nothing."""
    return [piece for piece in (part.strip(" :;,.()'") for part in message.split("...")) if len(piece.split()) > 1]


def has(text: str, message: str) -> bool:
    """Whether the pieces are in the text one after the other."""
    at = 0
    for piece in pieces(message):
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def quoted(page: Path) -> list[str]:
    """Messages that an entry is about: quotes in bold."""
    return [re.sub(r"\s+", " ", text) for text in re.findall(r"\*\*`([^`]+)`\*\*", read(page))]


def strings() -> list[str]:
    found = [template(node) for _, tree in sources() for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))]
    return [each for each in found if each]


def test_every_warning_error_and_reason_has_an_entry() -> None:
    entries = quoted(ROOT / "docs" / "faq.md")
    missing = {message: where for message, where in spoken().items() if not any(has(entry, message) for entry in entries)}
    assert not missing


@pytest.mark.parametrize("page", MESSAGES, ids=named)
def test_quoted_messages_are_still_in_the_sources(page: Path) -> None:
    known = strings()
    entries = quoted(page)
    assert len(entries) >= 5
    for entry in entries:
        for piece in pieces(entry.removeprefix("standing down: ")):
            assert any(piece in text or has(piece, text) and pieces(text) for text in known), f"{page.name}: {piece!r}"


def test_the_line_at_start_is_as_it_is_printed() -> None:
    host = Host("1.10.1", best_effort=False, device=torch.device("cuda:0"), simulated=False, device_name="cuda:0 NVIDIA GeForce RTX 3060")
    line = f"{PREFIX} {__version__}: {announcement.describe(host, OffloadConfig())}"
    assert f"`{line}`" in re.sub(r"\s+", " ", read(ROOT / "README.md"))


# -- settings, status, index -------------------------------------------------------------------------------------------------------
def test_the_settings_table_has_all_of_them_in_their_order() -> None:
    rows = re.findall(r"^\| ([^|]+?) \|", read(ROOT / "README.md").split("## Settings")[1].split("\n## ")[0], re.MULTILINE)
    assert rows[1:] == [label for label, *_ in settings._OPTIONS.values()]


def test_the_index_entry_is_what_the_index_asks_for() -> None:
    entry = json.loads(read(ROOT / "docs" / "index-entry.json"))
    assert set(entry) == {"name", "url", "description", "tags"}
    assert re.fullmatch(r"https://[^ ]+\.git", entry["url"])
    assert set(entry["tags"]) <= {"script", "UI related", "manipulations"}
