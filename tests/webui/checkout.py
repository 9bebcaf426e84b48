"""The sources of a real WebUI, where SD_WEBUI_DIR names a checkout: for the tests that hold the double against them."""

from __future__ import annotations

import ast
import os
import warnings
from pathlib import Path

import pytest

CHECKOUT = os.environ.get("SD_WEBUI_DIR", "")

NEEDS_CHECKOUT = [
    pytest.mark.webui,
    pytest.mark.skipif(
        not (CHECKOUT and (Path(CHECKOUT) / "modules" / "lowvram.py").is_file()), reason="SD_WEBUI_DIR names no WebUI checkout"
    ),
]


def parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the host's strings have doubtful escapes
        return ast.parse(path.read_text(encoding="utf-8"))


def tree_of(name: str) -> ast.Module:
    return parse(Path(CHECKOUT) / "modules" / f"{name}.py")


def definitions(tree: ast.AST, kind=(ast.FunctionDef, ast.ClassDef)) -> dict[str, ast.AST]:
    return {node.name: node for node in ast.walk(tree) if isinstance(node, kind)}


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
