"""A document on disk: making sure of its files before any work, writing them, showing stored ones again.

Called by `command` and `running`. Needs no torch: tables can be made where nothing could be measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib_async_lowvram.bench import render, results
from lib_async_lowvram.bench.options import BenchError
from lib_async_lowvram.output_files import why_not_writable


def check_writable(path: Path | None) -> None:
    """Before any work. Raises `BenchError`."""
    reason = why_not_writable(path)
    if reason:
        raise BenchError(reason)


def write_outputs(document: dict[str, Any], json: Path | None, markdown: Path | None, png: Path | None) -> None:
    """Raises OSError."""
    if json is not None:
        results.write(json, document)
    if markdown is not None:
        markdown.write_text(render.markdown(document), encoding="utf-8")
    if png is not None and document["cases"]:
        render.draw(png, document)


def join(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One document with the cases of all, in order; the first's environment and settings. Raises `BenchError` where they are
    of different devices or versions of torch: one table must not mix them."""
    first = documents[0]
    for other in documents[1:]:
        for key in ("device", "torch"):
            if other["environment"][key] != first["environment"][key]:
                told = f"{first['environment'][key]}, {other['environment'][key]}"
                raise BenchError(f"these results are of different kinds of {key} ({told}): make a table of each")
    joined = ("cases", "loading", *results.ADDED, "notes")
    return {**first, **{key: [part for document in documents for part in document[key]] for key in joined}}


def show_stored(paths: Sequence[Path], markdown: Path | None, png: Path | None) -> dict[str, Any]:
    """Print the tables of stored documents, and write what is asked for. Raises `BenchError`."""
    document = join([results.read(path) for path in paths])
    for path in (markdown, png):
        check_writable(path)
    if png is not None and not document["cases"]:
        raise BenchError("--png: there are no cases to draw")
    print(render.text(document))
    write_outputs(document, None, markdown, png)
    return document
