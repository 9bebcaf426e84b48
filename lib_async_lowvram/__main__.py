"""The command line: `python -m lib_async_lowvram demo`, `... bench`, `... plan`, `... doctor`, `... txt2img`.

Exit codes: 0 all well; 1 outputs differ from the resident model's; 2 it could not run: wrong arguments, a missing
package, a device that cannot be used, a file that cannot be read or written; 130 interrupted. Importing this module imports
nothing heavy, so that `--help` and messages about missing packages come at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from lib_async_lowvram import __version__
from lib_async_lowvram.bench import command as bench
from lib_async_lowvram.commands import demo, doctor, plan, txt2img
from lib_async_lowvram.commands.common import CommandError, OutputsDiffer

COMMANDS = (demo, bench, plan, doctor, txt2img)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (argparse exits with 2 by itself for wrong arguments)."""
    parser = argparse.ArgumentParser(prog="python -m lib_async_lowvram", description="Async LowVRAM: asynchronous weight moving.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    needs = options.needs(options) if hasattr(options, "needs") else ()
    missing = [package for package in needs if find_spec(package) is None]
    if missing:
        return _failed(f"{options.what} needs {', '.join(missing)}: python -m pip install {' '.join(missing)}")
    try:
        return options.run(options) or 0
    except CommandError as error:
        return _failed(str(error))
    except OutputsDiffer:
        print("error: the outputs are not bit for bit equal to the resident model's", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _failed(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
