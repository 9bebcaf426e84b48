"""The script the WebUI finds: what it registers, what it says, and that nothing gets out of it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models

from lib_async_lowvram import __version__
from lib_async_lowvram.webui.settings import ENABLED


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
    assert ran["read_status"]() == {"state": "standing_down", "reason": ran["reason"]}
    ran["AsyncLowVRAMScript"]().process_before_every_sampling(None, x=1)
    webui.script_callbacks.fire("ui_settings")
    assert ENABLED in webui.data
    webui.script_callbacks.fire("script_unloaded")


def test_the_route_is_added_with_and_without_a_ui(webui, run_script, on_the_simulated_device):
    pytest.importorskip("fastapi", reason="the WebUI's own web framework is not installed here")
    run_script()
    app = FakeApp()
    webui.script_callbacks.fire("app_started", None, app)
    webui.script_callbacks.fire("app_started", object(), app)
    assert [route.path for route in app.router.routes] == ["/async-lowvram/status"]


def test_nothing_gets_out_of_a_broken_start(webui, run_script, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "lib_async_lowvram.webui.host", None)  # as if a file were missing
    ran = run_script()
    assert ran["read_status"]()["state"] == "standing_down"
    assert "failed to start" in ran["reason"]
    assert "standing down" in capfd.readouterr().out
    assert webui.errors.reports


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
    script.process_before_every_sampling(None, x=1, noise=2, c=3, uc=4)
    assert calls == [1]


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
