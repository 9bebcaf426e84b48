"""`plan --check` end to end at a tiny size. Nothing about time is judged: the machine may be busy."""

from __future__ import annotations

import json

import pytest
import torch

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench.contenders import Async

TINY = ["plan", "--check", "--channels", "16", "--latent", "8", "--passes", "2"]


def test_check(tmp_path, capsys):
    out = tmp_path / "check.json"
    torch.set_num_threads(2)
    try:
        assert main([*TINY, "--budget", "40%,2", "--bandwidth", "1", "--json", str(out)]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    figures = json.loads(out.read_text())
    assert figures["bitwise_equal"] is True and figures["bandwidth_bytes_per_s"] == 1e9
    share, fixed = figures["budgets"]
    assert fixed["budget_bytes"] == 2 << 20
    for row in (share, fixed):
        assert row["mover"]["state"] == "active"
        assert row["ratio"] == pytest.approx(row["measured_seconds"] / row["predicted_seconds"])
        assert row["predicted_seconds"] >= row["resident_seconds"] * 0.999
        # The prediction knows no layer's time, so it may choose other residents, but of much the same size.
        assert row["measured_streamed_bytes"] == pytest.approx(row["predicted_streamed_bytes"], abs=0.2 * figures["weight_bytes"])
    assert "measured/predicted" in capsys.readouterr().out


def test_wrong_pixels_are_told(monkeypatch, capsys):
    right = Async.run_pass
    monkeypatch.setattr(Async, "run_pass", lambda self, inputs: right(self, inputs) + 1e-6)
    assert main([*TINY, "--budget", "50%", "--bandwidth", "1"]) == 1
    printed = capsys.readouterr()
    assert "NOT EQUAL" in printed.out and "not bit for bit equal" in printed.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--channels", "12"], "--channels must be a multiple of 8"),
        (["--channels", "8000"], "of at most 320"),
        (["--latent", "9"], "--latent must be a multiple of 8"),
        (["--tflops", "3"], "--tflops says nothing"),
        (["--compute-ms", "3"], "--compute-ms says nothing"),
        (["--lookahead", "3"], "--lookahead says nothing"),
    ],
)
def test_wrong_arguments(arguments, says, capsys):
    assert main(["plan", "--check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error
