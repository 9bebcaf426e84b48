"""Fixtures: a WebUI that is not there. The double's `modules` package is importable during one test and gone after it."""

from __future__ import annotations

import importlib
import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).resolve().parent
FAKE = HERE / "fake_webui"
ROOT = HERE.parent.parent
SCRIPT = ROOT / "scripts" / "async_lowvram.py"

for path in (str(ROOT), str(HERE)):  # the library, as the WebUI has it on its path; the helpers beside this file
    if path not in sys.path:
        sys.path.insert(0, path)

from lora_fixtures import pair, placed, plain, servers  # noqa: E402, F401
from moving_rig import moving  # noqa: E402, F401
from recording_mover import RecordingMover  # noqa: E402
from retry_rig import lines  # noqa: E402, F401

from lib_async_lowvram.webui import patching  # noqa: E402

_NAMES = ("devices", "errors", "images", "launch_utils", "lowvram", "options", "patches", "script_callbacks", "scripts", "sd_models",
          "sd_samplers_common", "sd_vae_approx", "sd_vae_taesd", "shared", "shared_state", "upscaler")


def _forget_fakes() -> None:
    for name in [name for name in sys.modules if name == "modules" or name.startswith("modules.") or name == "gradio"]:
        del sys.modules[name]


@pytest.fixture
def webui(monkeypatch):
    """The double: `webui.lowvram`, `webui.sd_models` ... are its modules, freshly imported."""
    _forget_fakes()
    monkeypatch.syspath_prepend(str(FAKE))
    host = SimpleNamespace(**{name: importlib.import_module(f"modules.{name}") for name in _NAMES})
    host.shared.state = host.shared_state.State()
    host.data = host.shared.opts.data
    yield host
    _close_integration(host)
    _forget_fakes()


def _close_integration(host) -> None:
    handler = patching.handler_of(host.lowvram, "setup_for_low_vram")
    if handler is not None:
        handler.__self__._in_job = False
        handler.__self__.close()


@pytest.fixture
def on_the_simulated_device(monkeypatch):
    monkeypatch.setenv("ASYNC_LOWVRAM_DEVICE", "simulated")


@pytest.fixture
def said(caplog):
    """What our logger said so far, as text. Our logger may have been told to keep its lines from pytest's."""
    logger = logging.getLogger("async_lowvram")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    logger.propagate = False
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture
def run_script(webui):
    """Runs scripts/async_lowvram.py as the WebUI does; returns its globals. What it hangs on our logger goes with the test."""
    logger = logging.getLogger("async_lowvram")
    handlers, propagate = list(logger.handlers), logger.propagate
    yield lambda: runpy.run_path(str(SCRIPT))
    logger.handlers[:] = handlers
    logger.propagate = propagate


@pytest.fixture
def recording(webui):
    """A started integration over a `RecordingMover`; `recording.mover` once a model is there."""
    from lib_async_lowvram.webui.host import Host
    from lib_async_lowvram.webui.lowvram import Integration

    host = Host("1.10.1", False, torch.device("cpu"), True, "simulated")
    found = SimpleNamespace(mover=None)

    def open_mover(config, device):
        found.mover = RecordingMover(config, device)
        return found.mover

    found.start = lambda: Integration.start(host, make_mover=open_mover)
    found.integration = found.start()
    return found
