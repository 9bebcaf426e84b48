"""What the host spends per pass: everything streams where it should, and the figures add up."""

from __future__ import annotations

import json

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench.overhead import SHARES


def test_the_rows(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    assert main(["bench", "overhead", "--passes", "2", "--rounds", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["units"] == 391
    streamed = found["streamed_units"]
    assert (streamed["bare"], streamed["all streaming"]) == (0, 391)
    assert 391 > streamed["10% on the device"] > streamed["90% on the device"] > 0
    assert len(streamed) == 1 + len(SHARES)
    seconds, own = found["seconds_per_pass"], found["overhead_seconds"]
    assert all(own[name] == seconds[name] - seconds["bare"] for name in seconds)
    assert "us per streamed unit" in capsys.readouterr().out


def test_what_it_does_not_take(capsys):
    assert main(["bench", "overhead", "--model", "tiny"]) == 2
    assert "--model" in capsys.readouterr().err
