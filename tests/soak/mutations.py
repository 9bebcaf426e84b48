"""The mutation run: every wait, record and host wait of the mover, taken out in turn, must be caught by a test.

`python -m tests.soak.mutations [--only FILE] [--list]` copies the project into a temporary folder for each, changes one call and runs the
tests that judge orderings, until one fails. A wait or a host wait is left out; a record gives an event that orders nothing. Prints one
line for each: where, what, and the first test that failed, or SURVIVED. Exit code 1 if any did that is not in `REDUNDANT`, which says why.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lib_async_lowvram"
NOT_THE_MOVER = {"bench", "commands", "webui", "large", "standalone"}
IMPLEMENTATIONS = {
    *("simulated.py", "cuda.py", "recorder.py", "streams.py", "copy_engine.py", "simulated_memory.py", "host_memory.py"),
    *("use_logger.py", "recorder_actors.py", "happens_before.py", "cuda_errors.py", "choose.py"),
}
CALLS = ("wait", "record", "synchronize", "outwait")
FIRST = """steady steady_between events lookahead write_back kept fetch_ahead changeover buffers failed_copies preview_worker staging
loose_and_packing foreign_formats gradients"""
LAST = ROOT / "tests/mover/test_fault_table.py"  # takes a minute, and judges no orderings
TESTS = (
    *(ROOT / f"tests/mover/test_{each}.py" for each in FIRST.split()),
    ROOT / "tests/soak/test_soak.py",
    *(each for each in sorted((ROOT / "tests/mover").glob("test_*.py")) if each != LAST),
    *(ROOT / "tests/device", LAST),
)
"""Those that catch most come first; pytest runs none twice."""
SECONDS = 900
REDUNDANT: dict[tuple[str, str, str], str] = {}
"""(file, function, source of the call) -> why nothing can come of leaving it out."""


@dataclass(frozen=True)
class Mutation:
    """One call in one file. `number`: among those of the file, in order of appearance."""

    file: str
    function: str
    line: int
    source: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.source}"


def calls_in(tree: ast.Module) -> list[tuple[ast.Call, str]]:
    """The calls in question, with the function they are in."""
    found: list[tuple[ast.Call, str]] = []

    def walk(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr in CALLS:
                timing = any(keyword.arg == "timing" for keyword in child.keywords)  # events that are only read, later
                if not timing and ast.unparse(child.func.value).rpartition(".")[2].lstrip("_") == "streams":
                    found.append((child, function))
            walk(child, inside)

    walk(tree, "")
    return sorted(found, key=lambda each: (each[0].lineno, each[0].col_offset))


def all_mutations() -> list[Mutation]:
    """Every one, file by file."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in NOT_THE_MOVER or path.name in IMPLEMENTATIONS:
            continue
        for number, (call, function) in enumerate(calls_in(ast.parse(path.read_text(encoding="utf-8")))):
            name = str(path.relative_to(PACKAGE))
            found.append(Mutation(name, function, call.lineno, ast.unparse(call), number))
    return found


def mutated(mutation: Mutation) -> str:
    """The file's source with that call taken out."""
    tree = ast.parse((PACKAGE / mutation.file).read_text(encoding="utf-8"))
    call, _ = calls_in(tree)[mutation.number]
    if call.func.attr == "record":
        call.func = ast.Attribute(call.func.value, "record_nothing", ast.Load())
    else:
        call.func, call.args, call.keywords = ast.Name("id", ast.Load()), [ast.Constant(None)], []
    return ast.unparse(ast.fix_missing_locations(tree))


NOTHING = '''


def _record_nothing(self, stream, *, timing=False):
    event = self.record(self.current_stream(), timing=timing)  # which computes in step with the host, and is there already
    return type(event)(event.inner, {}, event.operation) if hasattr(event, "clock") else event


Streams.record_nothing = _record_nothing
'''
"""Added to the copy's `device/streams.py`: an event that orders nothing, for the simulated device and the recorder."""


def try_it(mutation: Mutation, python: str, tests: Iterable[Path]) -> str:
    """The first test that failed, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        left = shutil.ignore_patterns(".git", ".venv*", "docs", "demo", "*.egg-info", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=left)
        (copy / "lib_async_lowvram" / mutation.file).write_text(mutated(mutation), encoding="utf-8")
        with (copy / "lib_async_lowvram/device/streams.py").open("a", encoding="utf-8") as streams:
            streams.write(NOTHING)
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        files = (str(test.relative_to(ROOT)) for test in tests)
        command = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *files]
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "(it hung)"
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if failed is None and done.returncode:
            return f"(pytest ended with {done.returncode})"
        return failed[1] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.mutations", description=__doc__)
    parser.add_argument("--only", help="a part of the file's name")
    parser.add_argument("--list", action="store_true", help="only say what would be tried")
    options = parser.parse_args()
    survived = 0
    for mutation in all_mutations():
        if options.only and options.only not in mutation.file:
            continue
        if options.list:
            print(mutation)
            continue
        caught = try_it(mutation, sys.executable, TESTS)
        why = REDUNDANT.get((mutation.file, mutation.function, mutation.source), "")
        survived += not caught and not why
        print(f"{mutation}  ->  {caught or 'SURVIVED' + (f' (redundant: {why})' if why else '')}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
