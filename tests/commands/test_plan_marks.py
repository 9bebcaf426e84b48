"""`plan --marks`: exact shapes under the planner, beside known schedules and simple rules."""

from __future__ import annotations

import json

import pytest

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench.shapes import sd15_shape, sdxl_shape
from lib_async_lowvram.commands import plan_marks


@pytest.mark.parametrize(
    ("shape", "pixels", "speed", "parameters", "units"),
    [(sd15_shape(), 512, 9.3e12, 859_520_964, 391), (sdxl_shape(), 1024, 12e12, 2_567_463_684, 1050)],
)
def test_the_shapes_are_the_published_models(shape, pixels, speed, parameters, units):
    load = plan_marks.exact(shape, pixels, speed)
    assert len(load.nbytes) == units
    assert 0 <= load.total_bytes - 2 * parameters < 1024 * units  # two bytes each, and padding
    assert load.bandwidth * load.compute_seconds == pytest.approx(load.total_bytes)


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan_marks, "MARKS", {"sd15": {1: {30: 227.38, 70: 178.38}}, "sdxl": {}})
    path = tmp_path / "marks.json"
    assert main(["plan", "--marks", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["marks"]
    assert [row["share_percent"] for row in rows] == [30, 70]
    for row in rows:
        assert row["limit_seconds"] <= row["floor_seconds"] <= row["plan_seconds"] <= row["mark_seconds"] * 1.0001
        assert row["plan_seconds"] <= min(row["rules_seconds"].values()) * 1.0001
        assert row["resident_bytes"] + row["ring_bytes"] <= row["budget_bytes"]
    assert "planned in" in capsys.readouterr().out
