"""What the extension must never do, read off its sources: unpickle, go to the network, run other programs or text, guess file names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "lib_async_lowvram").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), ROOT / "install.py"])

UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "copyreg"}
NETWORK = {
    *("urllib", "urllib3", "http", "requests", "httpx", "aiohttp", "socket", "ssl", "ftplib", "smtplib"),
    *("huggingface_hub", "torch.hub"),
}
PROGRAMS = {"subprocess", "pty", "multiprocessing"}
CALLS = {
    *("torch.load", "torch.hub.load", "numpy.load", "np.load", "eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "os.execv", "os.spawnv", "tempfile.mktemp", "os.tempnam"),
}
# Where one of these is needed after all, and why that is safe.
ALLOWED = {
    ("environment.py", "subprocess"): "bench asks nvidia-smi for the driver's version: a fixed command, without a shell",
    **{
        ("doctor_memory.py", what): "doctor --memory reads the status of the user's own WebUI; nothing is kept"
        for what in ("http.client", "urllib.error", "urllib.request")
    },
}


def told(path: Path) -> list[str]:
    """Everything forbidden that one file imports or calls."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found += [called] if called in CALLS else []
        for name in names:
            if name in UNPICKLING | NETWORK | PROGRAMS or name.split(".")[0] in UNPICKLING | NETWORK | PROGRAMS:
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_downloaded_or_run(path: Path) -> None:
    assert [what for what in told(path) if (path.name, what) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from urllib.request import urlopen", "import torch\ntorch.load('x')", "eval('1')"),
        "import tempfile\ntempfile.mktemp()",
        "def f():\n    from subprocess import run",
    ],
)
def test_it_would_be_told(source: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(source, encoding="utf-8")
    assert told(path)


def test_temporary_files_have_names_nobody_knows_beforehand() -> None:
    """Only from `tempfile`, which makes them with names of its own; none in a fixed place."""
    fixed = ("/tmp", "/var/tmp", "C:\\Temp", "gettempdir")
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith(fixed[:3]), path
            if isinstance(node, ast.Attribute):
                assert node.attr != "gettempdir", path
