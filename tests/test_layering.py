"""DESIGN.md's layers, enforced: who may import whom, how long a file may be, and that each tells what it is for."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lib_async_lowvram"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MOST_LINES = 350

# Package or top-level module -> (layer, packages of others it may import). Top-level modules not named here are layer 2.
HOST = frozenset({"modules", "gradio", "fastapi"})
# What the benchmark compares with, imported by those contenders alone, where installed.
PEERS = frozenset({"diffusers", "accelerate", "mmgp"})
LAYERS: dict[str, tuple[int, frozenset[str]]] = {
    "core": (0, frozenset()),
    "config": (0, frozenset()),
    "log": (0, frozenset()),
    "output_files": (0, frozenset()),
    "safetensors_header": (0, frozenset()),
    "": (0, frozenset()),  # lib_async_lowvram/__init__.py
    "device": (1, frozenset({"torch"})),
    "large": (2, frozenset({"torch"})),
    "webui": (3, frozenset({"torch", "PIL"}) | HOST),
    "bench": (4, frozenset({"torch", "numpy", "safetensors", "tqdm", "matplotlib"}) | PEERS),
    # Pictures without a WebUI: on the classes of others, imported when one is made.
    "standalone": (4, frozenset({"torch", "diffusers", "transformers", "tokenizers", "PIL"})),
    "commands": (5, frozenset({"torch", "tqdm"})),
    "__main__": (6, frozenset()),
}
TOP_LEVEL = (2, frozenset({"torch"}))
# A layer imports itself or lower ones, but webui, bench and standalone stand side by side.
NEVER = {("bench", "webui"), ("webui", "bench"), ("commands", "webui"), ("__main__", "webui")}
NEVER |= {("standalone", "webui"), ("standalone", "bench"), ("bench", "standalone")}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def home(module: str) -> str:
    """The key of LAYERS for a module of ours: its package, or its own name at top level."""
    return (module.split(".") + [""])[1]


def layer_of(module: str, path: Path) -> tuple[int, frozenset[str]]:
    key = home(module)
    if key in LAYERS:
        return LAYERS[key]
    if (ROOT / PACKAGE / key).is_dir():
        pytest.fail(f"{path.relative_to(ROOT)}: the package {key} has no layer; give it one in {Path(__file__).name} and in DESIGN.md")
    return TOP_LEVEL


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, absolute name) of everything a file imports, wherever in it. Names from packages may be modules or not."""
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(filter(None, [*parents[: len(parents) - node.level + 1], base]))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stay_in_their_layer(path: Path) -> None:
    module = module_name(path)
    layer, others = layer_of(module, path)
    wrong = []
    for line, name in imported(path):
        top = name.split(".")[0]
        if top == PACKAGE:
            # `from lib_async_lowvram import x`: a module of that name, or one of the package's own names.
            key = home(name)
            whole = (ROOT / PACKAGE / f"{key}.py").exists() or (ROOT / PACKAGE / key).is_dir()
            target, _ = layer_of(name, path) if whole else LAYERS[""]
            if target > layer or (home(module), key) in NEVER:
                wrong.append(f"line {line}: {name} is of a higher layer")
        elif top not in sys.stdlib_module_names and top not in others:
            wrong.append(f"line {line}: {name} is not for this layer")
    assert not wrong, f"{path.relative_to(ROOT)} (layer {layer}): " + "; ".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES, "one file, one concept: split it"
    assert ast.get_docstring(ast.parse(text)), "no docstring"


def test_the_script_only_registers_callbacks() -> None:
    script = ROOT / "scripts" / "async_lowvram.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 120


def test_install_needs_nothing_but_the_standard_library() -> None:
    path = ROOT / "install.py"
    assert {name.split(".")[0] for _, name in imported(path)} <= set(sys.stdlib_module_names)


def test_relative_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge itself: a relative import one package up counts as what it is."""
    package = tmp_path / PACKAGE / "core"
    package.mkdir(parents=True)
    lines = ["from ..mover import AsyncModelMover", "from .. import network", "from . import order", "import torch"]
    (package / "bad.py").write_text("\n".join(lines))
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    names = [name for _, name in imported(package / "bad.py")]
    assert names == [f"{PACKAGE}.mover.AsyncModelMover", f"{PACKAGE}.network", f"{PACKAGE}.core.order", "torch"]
