"""What every command shares: exit codes, messages on stderr, and an import that costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lib_async_lowvram import __main__ as command_line
from lib_async_lowvram.commands import demo
from lib_async_lowvram.commands.common import CommandError, OutputsDiffer

HEAVY = "{'torch', 'numpy', 'safetensors', 'tqdm', 'matplotlib'}"


def in_new_process(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)


def test_importing_imports_nothing_heavy():
    done = in_new_process(f"import sys, lib_async_lowvram.__main__; print(sorted({HEAVY} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "--help"], ["doctor", "--help"], ["demo", "--help"], ["bench", "--help"], ["fly"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from lib_async_lowvram.__main__ import main\n"
        f"try: main({arguments})\n"
        f"finally: print(sorted({HEAVY} & set(sys.modules)))"
    )
    done = in_new_process(code)
    assert done.returncode == (2 if arguments == ["fly"] else 0) and done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (CommandError("no room"), 2, "error: no room\n"),
        (OutputsDiffer(), 1, "error: the outputs are not bit for bit equal to the resident model's\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, says):
    def run(options):
        raise raised

    monkeypatch.setattr(demo, "run", run)
    assert command_line.main(["demo"]) == code
    assert capsys.readouterr().err == says


def test_what_is_not_foreseen_is_not_hidden(monkeypatch):
    monkeypatch.setattr(demo, "run", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command_line.main(["demo"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["doctor"], "error: the doctor needs torch: python -m pip install torch\n"),
        (["plan", "--check"], "error: plan --check or --marks needs torch, tqdm: python -m pip install torch tqdm\n"),
    ],
)
def test_missing_packages(monkeypatch, capsys, arguments, says):
    real = command_line.find_spec
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name in ("torch", "tqdm") else real(name))
    assert command_line.main(arguments) == 2
    assert capsys.readouterr().err == says
