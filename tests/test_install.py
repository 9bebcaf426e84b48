"""install.py: says in one line what is the matter, never raises, does not import torch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "install.py"


@pytest.fixture()
def install():
    spec = importlib.util.spec_from_file_location("async_lowvram_install", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.1.2+cu121", (2, 1, 2)), ("2.13.0a0+git1", (2, 13, 0)), ("2", (2,)), ("unknown", ()), ("", ()), ("2.x.1", (2,))],
)
def test_release(install, version, numbers):
    assert install.release(version) == numbers


@pytest.mark.parametrize(
    ("python", "torch", "words"),
    [
        ((3, 10, 6), "2.1.2+cu121", []),
        ((3, 11, 7), "2.13.0", []),
        ((4, 0, 0), "10.0", []),
        ((3, 9, 18), "2.1.2", ["Python 3.9.18 is older than 3.10"]),
        ((3, 10, 6), "2.0.1", ["torch 2.0.1 is older than 2.1"]),
        ((3, 10, 6), "1.13.1+cu117", ["torch 1.13.1+cu117 is older than 2.1"]),
        ((3, 10, 6), None, ["torch is not installed"]),
        ((3, 10, 6), "main", ["torch has a version that cannot be read: 'main'"]),
        ((3, 8, 0), None, ["Python 3.8.0 is older than 3.10", "torch is not installed"]),
    ],
)
def test_problems(install, python, torch, words):
    assert install.problems(python, torch) == words


@pytest.mark.parametrize("error", [metadata.PackageNotFoundError("torch"), ValueError("broken"), OSError("no such file")])
def test_broken_metadata_do_not_stop_the_webui(install, monkeypatch, capsys, error):
    def version(name: str) -> str:
        raise error

    monkeypatch.setattr(install.metadata, "version", version)
    install.main()
    assert capsys.readouterr().out == "[Async LowVRAM] will not work here: torch is not installed. The WebUI starts without it.\n"


def test_metadata_without_a_version(install, monkeypatch):
    monkeypatch.setattr(install.metadata, "version", lambda name: None)
    assert install.problems((3, 10, 6), install.torch_version()) == ["torch is not installed"]


def test_as_the_webui_runs_it():
    """A process of its own, one line, exit code 0, and torch stays unloaded."""
    code = f"import runpy, sys; runpy.run_path({str(PATH)!r}, run_name='__main__'); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[Async LowVRAM] nothing to install.\n", "")
