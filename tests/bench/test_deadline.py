"""Keeping the time: repeats go first, then rows, and it is told. And the suite that keeps it."""

from __future__ import annotations

import pytest

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench import results, suite
from lib_async_lowvram.bench.deadline import Costed, Deadline, fit
from lib_async_lowvram.bench.options import CONTENDERS, BenchError

ROWS = (
    Costed("resident", 1.0, 1, True),
    Costed("stock", 2.0, 1, True),
    Costed("accelerate", 20.0, 1, False),
    Costed("async 50%", 1.0, 3, False),
)
"""One round of 5 passes: 6 + 12 + 120 + 8 seconds; of 2: 3 + 6 + 60 + 5."""


@pytest.mark.parametrize(
    ("seconds", "rounds", "passes", "keys", "told"),
    [
        (float("inf"), 3, 5, 4, []),
        (438, 3, 5, 4, []),
        (437, 2, 5, 4, ["rounds: 2 instead of 3"]),
        (145, 1, 4, 4, ["rounds: 1 instead of 3", "passes per round: 4 instead of 5"]),
        (74, 1, 2, 4, ["rounds: 1 instead of 3", "passes per round: 2 instead of 5"]),
        (73, 1, 2, 3, ["accelerate: no time for it (20.00 s per pass)"]),
        (13, 1, 2, 2, ["async 50%: no time for it (1.00 s per pass)"]),
        (-1, 1, 2, 2, ["async 50%: no time for it (1.00 s per pass)"]),
    ],
)
def test_fit(seconds, rounds, passes, keys, told):
    made = fit(ROWS, 3, 5, seconds)
    assert (made.rounds, made.passes, len(made.keys)) == (rounds, passes, keys)
    assert set(told) <= set(made.dropped) and made.keys[:2] == ("resident", "stock")


def test_deadline():
    assert Deadline(None).left() == Deadline(None).part(0.5).left() == float("inf")
    assert 0 < Deadline(100.0).part(0.25).left() <= 25
    assert Deadline(-1.0).left() < 0 and Deadline(-1.0).part(0.5).left() <= 0


def test_the_gpu_suite_is_the_issues():
    steps = {step.name: step.settings for step in suite.steps_of("gpu", seed=3)}
    assert list(steps) == ["sd15", "sdxl", "loading", "sd15-large", "sdxl-large"]
    for name in ("sd15", "sdxl"):
        assert steps[name].contenders == CONTENDERS and steps[name].batches == (2,) and steps[name].seed == 3
        assert [str(budget) for budget in steps[name].budgets] == ["10%", "25%", "50%", "70%", "90%", "equal"]
    assert steps["loading"].loading and steps["loading"].models == ()
    assert min(steps["sd15-large"].batches) > 2 and "async" in steps["sdxl-large"].contenders
    assert suite.GPU_SECONDS < 480
    with pytest.raises(BenchError, match="choose gpu or tiny"):
        suite.steps_of("cpu", seed=0)


def test_the_tiny_suite_keeps_a_time_that_is_much_too_short(tmp_path, capsys):
    """One round of the least is measured all the same, and whatever was left out is told."""
    folder = tmp_path / "suite"
    assert main(["bench", "--suite", "tiny", "--json-dir", str(folder), "--seconds", "0.001"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["suite.md", "suite.png", "tiny.json"]
    document = results.read(folder / "tiny.json")
    case = document["cases"][0]
    assert case["rounds"] == 1 and [result["contender"] for result in case["results"]] == ["resident", "stock", "async"]
    assert any("rounds: 1 instead of 2" in line for line in case["dropped"]) and any("no time for it" in line for line in case["dropped"])
    assert len(document["notes"]) == 2 and all("the time was over" in note for note in document["notes"])
    assert "loading: not run, the time is over" in capsys.readouterr().out
    assert "left out to keep the time" in (folder / "suite.md").read_text()


def test_the_gpu_suite_needs_a_gpu(tmp_path, capsys):
    assert main(["bench", "--suite", "gpu", "--json-dir", str(tmp_path), "--device", "simulated"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_a_step_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    ran = []

    def run_bench(settings, shared):
        ran.append(settings.json.stem)
        if len(ran) == 1:
            raise RuntimeError("CUDA error: out of luck\nand more")
        raise BenchError("no room")

    monkeypatch.setattr(suite, "run_bench", run_bench)
    assert main(["bench", "--suite", "tiny", "--json-dir", str(tmp_path)]) == 2
    assert ran == ["tiny", "loading", "tiny-large"]
    printed = capsys.readouterr()
    assert "loading: not run, no room" in printed.out and "Traceback" in printed.err
    assert printed.err.endswith("error: steps failed: tiny: RuntimeError: CUDA error: out of luck\n")
