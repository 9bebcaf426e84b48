"""The script the WebUI finds: what it registers, what it says, and that nothing gets out of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models

from lib_async_lowvram import __version__
from lib_async_lowvram.webui import freshness
from lib_async_lowvram.webui.settings import ENABLED

PICTURE = SimpleNamespace(width=640, height=448, batch_size=2)


class FakeApp:
    def __init__(self):
        self.router = SimpleNamespace(routes=[])

    def add_api_route(self, path, endpoint, methods):
        self.router.routes.append(SimpleNamespace(path=path, endpoint=endpoint, methods=methods))


def test_registers_its_callbacks_and_one_line(webui, on_the_simulated_device, run_script, said, capfd):
    run_script()
    assert set(webui.script_callbacks.callbacks) == {"ui_settings", "app_started", "script_unloaded", "before_ui"}
    line = [line for line in said().splitlines() if "async_lowvram" in line]
    assert len(line) == 1
    for part in (__version__, "simulated", "WebUI 1.10.1", "budget for weights automatic", "UNet"):
        assert part in line[0]
    assert "[Async LowVRAM]" in capfd.readouterr().err


def test_stands_down_in_one_line_and_touches_nothing(webui, run_script, said, monkeypatch):
    monkeypatch.delenv("ASYNC_LOWVRAM_DEVICE", raising=False)
    functions = (webui.lowvram.setup_for_low_vram, webui.devices.torch_gc, webui.shared_state.State.begin)
    ran = run_script()
    assert "standing down: the WebUI runs on the CPU" in said()
    assert functions == (webui.lowvram.setup_for_low_vram, webui.devices.torch_gc, webui.shared_state.State.begin)
    status = ran["panel"].status()
    assert (status["state"], status["reason"], status["advice"]) == ("standing_down", ran["reason"], "")
    assert status["trial"]["state"] == "idle" and ran["panel"].start_trial() == (False, ran["reason"])
    assert ran["panel"].timeline() == {"schema": 1, "network": None, "seconds": 0.0, "spans": []}
    ran["AsyncLowVRAMScript"]().process(PICTURE)
    ran["AsyncLowVRAMScript"]().process_before_every_sampling(PICTURE, x=1)
    webui.script_callbacks.fire("ui_settings")
    assert ENABLED in webui.data
    webui.script_callbacks.fire("script_unloaded")


def test_the_route_is_added_with_and_without_a_ui(webui, run_script, on_the_simulated_device):
    pytest.importorskip("fastapi", reason="the WebUI's own web framework is not installed here")
    run_script()
    app = FakeApp()
    webui.script_callbacks.fire("app_started", None, app)
    webui.script_callbacks.fire("app_started", object(), app)
    trial = ["/async-lowvram/trial"] * 2
    assert [route.path for route in app.router.routes] == ["/async-lowvram/status", "/async-lowvram/timeline", *trial]


def test_nothing_gets_out_of_a_broken_start(webui, run_script, monkeypatch, capfd):
    for name in ("start", "panel", "lowvram"):
        monkeypatch.delitem(sys.modules, f"lib_async_lowvram.webui.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lib_async_lowvram.webui.host", None)  # as if a file were missing
    ran = run_script()
    assert ran["panel"] is None  # it needs what is missing, too
    assert ran["reason"].startswith("the extension was updated while the WebUI ran: restart the WebUI")  # the library was loaded before
    assert "standing down" in capfd.readouterr().out
    assert webui.errors.reports


def test_a_first_start_that_fails_says_so(webui, run_script, monkeypatch, capfd):
    for name in [name for name in sys.modules if name.split(".")[0] == "lib_async_lowvram"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lib_async_lowvram.webui.host", None)
    assert run_script()["reason"] == "the extension failed to start (ModuleNotFoundError)"


def test_new_scripts_with_the_library_of_before_an_update(webui, run_script, monkeypatch, capfd):
    from lib_async_lowvram import log

    monkeypatch.delattr(log, "remember")  # as an older one would lack it
    monkeypatch.delitem(sys.modules, "lib_async_lowvram.webui.start", raising=False)
    monkeypatch.delitem(sys.modules, "lib_async_lowvram.webui.panel", raising=False)
    ran = run_script()
    assert ran["integration"] is None and ran["panel"] is None
    assert "restart the WebUI (not only Reload UI)" in capfd.readouterr().out
    webui.script_callbacks.fire("before_ui")
    assert ran["LargePicturesScript"]().show(False) is False


def test_files_newer_than_the_library(webui, run_script, on_the_simulated_device, monkeypatch, said):
    ran = run_script()
    assert ran["panel"].status()["restart"] == ""
    monkeypatch.setattr(freshness, "_loaded", "of another version")
    monkeypatch.setattr(freshness, "_looked", None)
    ran = run_script()  # Reload UI
    assert freshness.ADVICE in said()
    status = ran["panel"].status()
    assert status["restart"] == freshness.ADVICE
    assert status["advices"][0]["id"] == "restart"
    assert freshness.ADVICE in [message["text"] for message in status["messages"]]


def test_nothing_gets_out_when_the_library_is_missing(webui, run_script, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lib_async_lowvram")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lib_async_lowvram", None)
    run_script()
    assert set(webui.script_callbacks.callbacks) == {"script_unloaded"}
    assert len(webui.errors.reports) == 2


def test_the_always_on_script_has_no_controls_and_prepares_the_unet(webui, run_script, on_the_simulated_device, monkeypatch):
    ran = run_script()
    script = ran["AsyncLowVRAMScript"]()
    assert issubclass(ran["AsyncLowVRAMScript"], webui.scripts.Script)
    assert script.show(False) is webui.scripts.AlwaysVisible
    assert script.create_group is False
    assert script.title() == "Async LowVRAM"
    calls = []
    monkeypatch.setattr(ran["integration"], "prepare", lambda: calls.append(1))
    script.process_before_every_sampling(PICTURE, x=1, noise=2, c=3, uc=4)
    assert calls == [1]
    assert ran["panel"].pictures.describe() == "640x448, batch 2"  # what a trial will make


def test_older_hosts_prepare_at_the_first_step(webui, run_script, on_the_simulated_device, monkeypatch):
    monkeypatch.delattr(webui.scripts.Script, "process_before_every_sampling")
    ran = run_script()
    calls = []
    monkeypatch.setattr(ran["integration"], "prepare", lambda: calls.append(1))
    webui.script_callbacks.fire("cfg_denoiser", object())
    assert calls == [1]


def test_run_twice_as_reload_ui_does(webui, run_script, on_the_simulated_device):
    first = run_script()
    webui.script_callbacks.fire("script_unloaded")
    webui.script_callbacks.callbacks.clear()
    second = run_script()
    assert second["integration"] is not first["integration"]
    assert len(webui.patches.originals["async_lowvram"]) == 10


def test_run_twice_without_unloading(webui, run_script, on_the_simulated_device):
    first = run_script()
    second = run_script()
    assert second["integration"] is first["integration"]


def test_a_model_loaded_before_us_is_adopted(webui, run_script, on_the_simulated_device, monkeypatch):
    adopted = []
    monkeypatch.setattr("lib_async_lowvram.webui.lowvram.Integration.adopt", lambda self, model, originals=None: adopted.append(model))
    model = tiny_models.make()
    webui.sd_models.load_model(lambda: model)
    run_script()
    assert adopted == [model]


def test_the_script_stays_small():
    script = Path(__file__).resolve().parents[2] / "scripts" / "async_lowvram.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 120


def test_large_pictures_are_offered_where_the_extension_works(webui, run_script, on_the_simulated_device, monkeypatch):
    ran = run_script()
    script, begun = ran["LargePicturesScript"](), []
    assert script.title() == "Large pictures" and script.show(False) is script.show(True) is webui.scripts.AlwaysVisible
    monkeypatch.setattr(ran["integration"].large, "begin", lambda *args: begun.append(args))
    monkeypatch.setattr(ran["integration"].large, "end", lambda: begun.append("end"))
    script.process("p", "On", 512, 0, None)
    script.postprocess("p", "processed", "On", 512, 0, None)
    assert begun == [("p", ("On", 512, 0, None)), "end"]


def test_large_pictures_are_not_offered_where_it_stands_down(webui, run_script, monkeypatch):
    monkeypatch.delenv("ASYNC_LOWVRAM_DEVICE", raising=False)
    assert run_script()["LargePicturesScript"]().show(False) is False
