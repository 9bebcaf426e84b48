"""`txt2img` on the command line: what is refused before any work, with one line; and a picture, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.commands import txt2img
from tests.standalone.tiny import TINY_SD15, tiny_file

ROOT = Path(__file__).resolve().parents[2]
installed = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs the extra `standalone`")


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The line that it says."""
    try:
        assert main(["txt2img", *arguments]) == 2
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--checkpoint, --prompt"),
        (["--checkpoint", "x", "--prompt", "y", "--size", "100x100"], "width of 100"),
        (["--checkpoint", "x", "--prompt", "y", "--memory", "lots"], "is no amount of memory"),
        (["--checkpoint", "x", "--prompt", "y", "--steps", "0"], "--steps"),
        (["--checkpoint", "x", "--prompt", "y", "--cfg", "nan"], "--cfg"),
    ],
)
def test_arguments_that_make_no_sense(capsys: pytest.CaptureFixture, arguments: list[str], says: str) -> None:
    assert says in refused(capsys, *arguments)


def test_what_is_not_installed_is_named(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(txt2img, "NEEDS", ("torch", "a_package_nobody_has"))
    assert refused(capsys, "--checkpoint", "x", "--prompt", "y") == (
        "error: txt2img needs a_package_nobody_has: python -m pip install a_package_nobody_has"
    )


@installed
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--tile", "100"], "--tile 100: must be a multiple of 64"),
        (["--strength", "2"], "--strength 2: must be from 0 to 1"),
        (["--sampler", "Runge-Kutta"], "'Runge-Kutta' is no sampler: Euler,"),
        (["--device", "mps"], "MPS: host and device share"),
        (["--device", "abacus"], "not a device torch knows"),
        (["--memory", "10MB"], "too little for this model"),
        (["--spill", "/nowhere/at/all"], "cannot be written to /nowhere/at/all"),
        (["--out", "/nowhere/at/all/x.png"], "cannot write /nowhere/at/all/x.png"),
        (["--checkpoint", "none.safetensors"], "cannot read none.safetensors"),
    ],
)
def test_what_cannot_be_done(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list, says: str) -> None:
    from lib_async_lowvram.standalone import making

    monkeypatch.setattr(making, "family_of", lambda names: TINY_SD15)
    path = tiny_file(tmp_path, TINY_SD15)
    given = ["--checkpoint", str(path), "--prompt", "y", "--steps", "1", "--size", "64x64", "--out", str(tmp_path / "y.png")]
    assert says in refused(capsys, *given, *more)
    assert not (tmp_path / "y.png").exists()


@installed
def test_a_torch_that_is_too_old(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.1.2+cpu")
    said = refused(capsys, "--prompt", "y", "--checkpoint", str(tmp_path / "x"), "--out", str(tmp_path / "y.png"))
    assert said == "error: torch 2.1.2+cpu is too old for transformers, 2.2 or newer is needed"


@installed
def test_files_that_are_no_checkpoints(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    given = ["--prompt", "y", "--out", str(tmp_path / "y.png"), "--checkpoint"]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"PK\x03\x04 and more")
    assert "is a zip archive" in refused(capsys, *given, str(broken))
    save_file({"lora_unet_x": torch.zeros(2)}, str(broken))
    assert "holds no UNet" in refused(capsys, *given, str(broken))
    assert "cannot read" in refused(capsys, *given, str(tmp_path))


@installed
def test_a_picture_without_a_network(tmp_path: Path) -> None:
    """In a process of its own, where every connection is an error. The file says what it was made from."""
    from PIL import Image

    path, out = tiny_file(tmp_path, TINY_SD15), tmp_path / "picture.png"
    code = (
        "import socket, sys\n"
        "def no(*args, **kwargs): raise AssertionError('the network')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n"
        "from lib_async_lowvram.standalone import making\n"
        "from tests.standalone.tiny import TINY_SD15\n"
        "making.family_of = lambda names: TINY_SD15\n"
        "from lib_async_lowvram.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["txt2img", "--checkpoint", str(path), "--prompt", "dusk", "--negative-prompt", "fog", "--size", "128x64", "--steps", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments, "--out", str(out)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 tile of 128 x 64 pixels" in done.stdout and "read from the checkpoint" in done.stdout
    with Image.open(out) as image:
        assert image.size == (128, 64) and image.mode == "RGB"
        assert image.text["parameters"].startswith("dusk\nNegative prompt: fog\nSteps: 2, Sampler: Euler")


def test_a_bar_for_each_stage() -> None:
    made: list[FakeBar] = []

    class FakeBar:
        def __init__(self, desc: str, **more: object) -> None:
            self.desc, self.n, self.closed = desc, 0.0, False
            made.append(self)

        def update(self, by: float) -> None:
            self.n += by

        def close(self) -> None:
            self.closed = True

    bar = txt2img.Bar(FakeBar)
    bar.close()
    for stage, share in (("denoising", 0.25), ("denoising", 0.5), ("VAE", 1.0)):
        bar.moved(stage, share)
    assert [(each.desc, each.n, each.closed) for each in made] == [("denoising", 50.0, True), ("VAE", 100.0, False)]
    bar.close()
    assert made[1].closed
