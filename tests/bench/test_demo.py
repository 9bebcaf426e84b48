"""The demo end to end at a tiny size, its command line, and what it prints and draws. No timing is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib_async_lowvram import __main__ as command_line
from lib_async_lowvram import __version__
from lib_async_lowvram.bench import demo
from lib_async_lowvram.bench.measuring import same_bits
from lib_async_lowvram.bench.report import Timeline, table, write_trace
from lib_async_lowvram.core.stats import Span

KEYS = {
    "device",
    "bitwise_equal",
    "stock_seconds_per_pass",
    "async_seconds_per_pass",
    "limit_seconds_per_pass",
    "best_schedule_seconds_per_pass",
    "efficiency",
    "schedule_efficiency",
    "stall_seconds_per_pass",
    "peak_weight_bytes",
    "budget_bytes",
    "total_weight_bytes",
}


@pytest.fixture()
def tiny(monkeypatch):
    """Make the command line's demo a tiny one."""
    real = demo.DemoSettings
    monkeypatch.setattr(demo, "DemoSettings", lambda **given: real(**{"rounds": 1, "channels": 16, "latent": 8, **given}))


def run(*arguments: str) -> int:
    return command_line.main(["demo", "--device", "simulated", "--passes", "2", *arguments])


def test_demo(tmp_path, tiny, capsys):
    torch.set_num_threads(2)
    try:
        assert run("--out", str(tmp_path / "new" / "folder")) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    out = tmp_path / "new" / "folder"
    assert sorted(path.name for path in out.iterdir()) == ["summary.json", "timeline.png", "trace.json"]

    summary = json.loads((out / "summary.json").read_text())
    assert KEYS <= set(summary)
    assert summary["device"] == "simulated" and summary["bitwise_equal"] is True
    assert summary["budget_bytes"] == summary["total_weight_bytes"] // 2
    assert 0 < summary["peak_weight_bytes"] <= summary["budget_bytes"]
    assert summary["limit_seconds_per_pass"] >= summary["resident_seconds_per_pass"]
    assert summary["best_schedule_seconds_per_pass"] >= summary["limit_seconds_per_pass"] * 0.999
    assert summary["efficiency"] == pytest.approx(summary["limit_seconds_per_pass"] / summary["async_seconds_per_pass"])
    assert summary["schedule_efficiency"] == pytest.approx(summary["best_schedule_seconds_per_pass"] / summary["async_seconds_per_pass"])
    mover = summary["mover"]
    assert mover["state"] == "active" and mover["hits"] > 0 and mover["streamed_bytes"] > 0 and mover["host_waits"] == 0

    assert (out / "timeline.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    names = {(e["name"], e["args"].get("name")) for e in events if e["ph"] == "M"}
    assert {("process_name", "stock --lowvram"), ("process_name", "async"), ("thread_name", "stall")} <= names
    boxes = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in boxes} >= {"copy", "compute"} and all(e["ts"] >= 0 and e["dur"] > 0 for e in boxes)

    printed = capsys.readouterr()
    assert "bit for bit equal" in printed.out and "best schedule" in printed.out and "async" in printed.out


def test_wrong_pixels_are_told(tmp_path, tiny, monkeypatch, capsys):
    right = demo.Async.run_pass
    monkeypatch.setattr(demo.Async, "run_pass", lambda self, inputs: right(self, inputs) + 1e-6)
    assert run("--out", str(tmp_path)) == 1
    assert json.loads((tmp_path / "summary.json").read_text())["bitwise_equal"] is False
    printed = capsys.readouterr()
    assert "NOT EQUAL" in printed.out and "not bit for bit equal" in printed.err


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """Before any work."""
    monkeypatch.setattr(demo, "write_checkpoint", lambda *arguments: pytest.fail("worked before looking"))
    (tmp_path / "file").write_text("")
    assert run("--out", str(tmp_path / "file")) == 2
    assert run("--out", str(tmp_path / "file" / "below")) == 2
    error = capsys.readouterr().err
    assert "cannot write to the output folder" in error and "--out" in error


def test_a_device_that_is_not_there(tmp_path, capsys):
    assert command_line.main(["demo", "--device", "mps", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: MPS:")


def test_missing_packages(tmp_path, monkeypatch, capsys):
    real = command_line.find_spec
    monkeypatch.setattr(command_line, "find_spec", lambda name: None if name in ("tqdm", "matplotlib") else real(name))
    assert run("--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == "error: the demo needs tqdm, matplotlib: python -m pip install tqdm matplotlib\n"


@pytest.mark.parametrize("arguments", [[], ["demo", "--passes", "0"], ["demo", "--passes", "x"], ["demo", "--seed", "x"], ["fly"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(arguments)
    assert stopped.value.code == 2


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"{__version__}\n"


def test_same_bits():
    zero = torch.zeros(2)
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert same_bits(zero / 0, zero / 0)


def test_table():
    assert table(["a", "b"], [["x", "100"], ["long", "1"]]) == "a       b\n---------\nx     100\nlong    1"


def test_timeline_is_cut_and_filled():
    spans = [
        Span("compute", "early", 0.0, 1.5),
        Span("stall", "real", 2.0, 3.0),
        Span("stall", "none", 3.0, 3.00001),
        Span("copy", "late", 3.5, 9.0, 7),
        Span("copy", "outside", 9.0, 10.0, 7),
    ]
    cut = Timeline.cut("pass", spans, 1.0, 4.0)
    assert [(span.name, span.start_seconds, span.end_seconds) for span in cut.spans] == [
        ("early", 1.0, 1.5),
        ("real", 2.0, 3.0),
        ("late", 3.5, 4.0),
    ]
    filled = cut.with_resident_compute()
    assert [(span.start_seconds, span.end_seconds) for span in filled.lane("compute")] == [(1.0, 1.5), (1.5, 2.0), (3.0, 4.0)]
    assert filled.busy_seconds("compute") + filled.busy_seconds("stall") == pytest.approx(3.0)


def test_trace_is_in_microseconds(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, [Timeline("one", 10.0, 11.0, (Span("copy", "leaf", 10.25, 10.5, 42),))])
    boxes = [event for event in json.loads(Path(path).read_text())["traceEvents"] if event["ph"] == "X"]
    assert boxes == [{"ph": "X", "name": "leaf", "cat": "copy", "pid": 1, "tid": 1, "ts": 250000.0, "dur": 250000.0, "args": {"bytes": 42}}]
