"""What all commands share: how they fail, and how they read numbers from the command line.

Problem: exit codes and messages must be the same whichever command runs. A command's module has `add_parser(commands)`, whose
parser sets as defaults `run` (options -> None or exit code), `needs` (options -> packages it imports) and `what` (its name in
messages);
`run` raises one of these, and `__main__` turns that into a line on stderr and an exit code.

Standard library only: imported whenever the command line is.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from lib_async_lowvram.output_files import why_not_writable


class CommandError(Exception):
    """The command cannot run; the message is one line for the user. Exit code 2."""


class OutputsDiffer(Exception):
    """Outputs were not bit for bit equal to the reference's. Exit code 1."""


def at_least_one(text: str) -> int:
    """For `type=` of an argument: a whole number from 1 to a million or so."""
    value = int(text)
    if not 1 <= value <= 1 << 20:
        raise argparse.ArgumentTypeError(f"must be from 1 to {1 << 20}")
    return value


def not_negative(text: str) -> float:
    """For `type=` of an argument: a finite number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("must be a number, 0 or more")
    return value


def positive(text: str) -> float:
    """For `type=` of an argument: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value


def check_writable(path: Path | None) -> None:
    """Before any work: that a file can be written there. Raises `CommandError`."""
    reason = why_not_writable(path)
    if reason:
        raise CommandError(reason)


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Raises `CommandError` where that cannot be written."""
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
