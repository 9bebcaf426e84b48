"""The panel's server side: what it puts together, against the published schemas; messages; freshness; axes; the host's trial pictures."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
from recording_mover import RecordingMover

from lib_async_lowvram.claims import Refused
from lib_async_lowvram.log import Remembered
from lib_async_lowvram.webui import freshness, plot, status
from lib_async_lowvram.webui.panel import Panel
from lib_async_lowvram.webui.settings import ENABLED, PREFIX

DOCS = Path(__file__).resolve().parents[2] / "docs"


def validated(answer: dict, name: str) -> dict:
    """`answer` as JSON, if docs/NAME.schema.json agrees."""
    jsonschema = pytest.importorskip("jsonschema", reason="validates what the schema says")
    answer = json.loads(json.dumps(answer, allow_nan=False))
    schema = json.loads((DOCS / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    found = jsonschema.Draft202012Validator(schema).iter_errors(answer)
    assert [f"{list(problem.absolute_path)}: {problem.message}" for problem in found] == []
    return answer


# -- what was said -----------------------------------------------------------------------------------------------------------
def record(text: str, at: float, level: int = logging.WARNING) -> logging.LogRecord:
    made = logging.LogRecord("async_lowvram", level, "", 0, text, (), None)
    made.created = at
    return made


def test_messages_newest_first_counted_and_bounded() -> None:
    said = Remembered(most=3)
    for at, text in enumerate(["a", "b", "a", "c", "d"]):
        said.handle(record(text, at))
    assert [(line["text"], line["count"], line["at"]) for line in said.newest()] == [("d", 1, 4), ("c", 1, 3), ("a", 2, 2)]


def test_the_same_words_at_another_level_are_another_message() -> None:
    said = Remembered()
    said.handle(record("a", 0, logging.INFO))
    said.handle(record("a", 1, logging.ERROR))
    assert [line["level"] for line in said.newest()] == ["error", "info"]


def test_a_broken_message_is_told_as_logging_does(capsys, monkeypatch) -> None:
    said = Remembered()
    said.handle(logging.LogRecord("async_lowvram", logging.INFO, "", 0, "%d", ("no number",), None))
    assert said.newest() == []
    assert "Logging error" in capsys.readouterr().err


# -- files and memory --------------------------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(freshness, "_loaded", None)
    monkeypatch.setattr(freshness, "_looked", None)
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("one", encoding="utf-8")
    (tmp_path / "sub" / "b.py").write_text("two", encoding="utf-8")
    return tmp_path


def test_an_update_is_seen_and_its_undoing(package) -> None:
    assert not freshness.restart_needed(package, now=0)  # before anything is remembered
    freshness.remember(package)
    assert not freshness.restart_needed(package, now=0)
    (package / "sub" / "b.py").write_text("three", encoding="utf-8")
    freshness.remember(package)  # scripts run again: what is in memory is still the old one
    assert not freshness.restart_needed(package, now=1)  # files are not read at every poll
    assert freshness.restart_needed(package, now=freshness.LOOK_SECONDS)
    (package / "sub" / "b.py").write_text("two", encoding="utf-8")
    assert not freshness.restart_needed(package, now=3 * freshness.LOOK_SECONDS)


@pytest.mark.parametrize("change", ["new", "gone", "renamed"])
def test_files_that_come_and_go(package, change) -> None:
    before = freshness.fingerprint(package)
    if change == "new":
        (package / "c.py").write_text("", encoding="utf-8")
    elif change == "gone":
        (package / "a.py").unlink()
    else:
        (package / "a.py").rename(package / "z.py")
    assert freshness.fingerprint(package) != before
    (package / "notes.txt").write_text("no matter", encoding="utf-8")


# -- put together ------------------------------------------------------------------------------------------------------------
def test_the_status_of_a_loaded_model(recording, webui) -> None:
    webui.sd_models.load_model(lambda: tiny_models.make())
    panel = Panel(recording.integration, "", Remembered())
    answer = validated(status.complete(panel.status()), "status")
    assert (answer["schema"], answer["generating"], answer["trial"]["state"], answer["restart"]) == (1, False, "idle", "")
    validated(panel.timeline(), "timeline")


def test_the_status_where_it_stands_down(webui) -> None:
    panel = Panel(None, "this is Forge", Remembered())
    answer = validated(status.complete(panel.status()), "status")
    assert (answer["state"], answer["reason"], answer["pass_seconds"], answer["vram"]) == ("standing_down", "this is Forge", None, None)
    assert panel.start_trial() == (False, "this is Forge")
    panel.stop_trial()
    panel.note(None)


def test_generating(recording, webui) -> None:
    panel = Panel(recording.integration, "", Remembered())
    webui.shared.state.begin(job="task(1)")
    assert panel.status()["generating"]
    webui.shared.state.end()
    assert not panel.status()["generating"]


def test_the_limit_of_the_disk(recording, monkeypatch) -> None:
    panel = Panel(recording.integration, "", Remembered())
    told = {"state": "active", "file_bytes": 10, "file_read_bytes": 6, "file_read_seconds": 2.0}
    monkeypatch.setattr(recording.integration, "status", lambda: dict(told))
    assert panel.status()["disk"] == {"read_bytes": 6, "bytes_per_s": 3.0}
    told.update(file_read_bytes=0, file_read_seconds=0.0)
    assert panel.status()["disk"] == {"read_bytes": 0, "bytes_per_s": None}
    told.update(file_bytes=0)
    assert panel.status()["disk"] is None


# -- axes --------------------------------------------------------------------------------------------------------------------
def test_axes_of_the_plot() -> None:
    def option(label, kind, apply, **more):
        return SimpleNamespace(label=label, kind=kind, apply=apply, **more)

    module = SimpleNamespace(axis_options=[], AxisOption=option)
    loaded = [SimpleNamespace(path="scripts/xyz_grid.py", module=module), SimpleNamespace(path="other.py", module=None)]
    assert plot.add_axes(loaded) == 1
    assert plot.add_axes(loaded) == 0
    enabled, lookahead, budget = module.axis_options
    assert [option.label for option in module.axis_options] == [
        "[Async LowVRAM] enabled", "[Async LowVRAM] lookahead (MB)", "[Async LowVRAM] budget (MB)",
    ]  # fmt: skip
    assert enabled.choices() == ["True", "False"]
    first = SimpleNamespace(override_settings={"CLIP_stop_at_last_layers": 2})
    second = SimpleNamespace(**vars(first))  # as the plot copies
    enabled.apply(first, "False", [])
    budget.apply(first, budget.kind("512"), [])
    lookahead.apply(second, 64, [])
    assert first.override_settings == {"CLIP_stop_at_last_layers": 2, ENABLED: False, PREFIX + "budget_mb": 512}
    assert second.override_settings == {"CLIP_stop_at_last_layers": 2, PREFIX + "lookahead_mb": 64}


def test_the_switch_within_a_job(recording, webui) -> None:
    model = tiny_models.make()
    webui.sd_models.load_model(lambda: model)
    integration = recording.integration
    webui.shared.state.begin(job="task(1)")
    assert integration.why_not() == ""
    webui.data[ENABLED] = False  # as the plot does by override_settings
    assert integration.why_not() == ""  # not in the middle of anything
    integration.follow_switch()
    assert integration.why_not() == "switched off in Settings"
    webui.data[ENABLED] = True
    integration.follow_switch()
    assert integration.why_not() == ""
    integration.force(False)
    integration.follow_switch()
    assert integration.why_not() == "switched off in Settings"
    integration.force(None)
    webui.shared.state.end()
    webui.shared.state.begin(job="task(2)")
    assert integration.why_not() == ""
    webui.shared.state.end()


def test_a_refusal_is_told_in_its_own_words(recording, webui, monkeypatch) -> None:
    def refuse(self, networks):
        raise Refused("unet (OptimizedModule) is compiled: attach the module that it was made from")

    monkeypatch.setattr(RecordingMover, "attach", refuse)
    webui.sd_models.load_model(lambda: tiny_models.make())
    status = Panel(recording.integration, "", Remembered()).status()
    assert status["state"] == "demoted"
    assert "is compiled: attach the module that it was made from" in status["reason"]
    assert webui.errors.reports
