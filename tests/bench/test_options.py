"""What `bench` can be asked for, and what it says when that is wrong: at once, in one line, with exit code 2."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench.options import (
    CONTENDERS,
    BenchError,
    Budget,
    parse_budgets,
    parse_contenders,
    parse_models,
    parse_numbers,
)


def test_budgets():
    budgets = parse_budgets(["600, 12.5%", "equal", "600"])
    assert budgets == (Budget(nbytes=600 << 20), Budget(share=0.125), Budget())
    assert [str(budget) for budget in budgets] == ["600", "12.5%", "equal"]
    assert budgets[0].of(1) == 600 << 20 and budgets[1].of(800) == 100
    assert [budget.equal for budget in budgets] == [False, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "not MB, N% or equal"),
        ("1GB", "not MB, N% or equal"),
        ("0", "above 0"),
        ("-5", "above 0"),
        ("nan", "not MB"),
        ("inf", "at most"),
        ("0%", "share"),
        ("101%", "share"),
        ("nan%", "not MB"),
        ("10%,,20%", "empty"),
        ("", "empty"),
    ],
)
def test_wrong_budgets(text, message):
    with pytest.raises(BenchError, match=message):
        parse_budgets([text])


def test_contenders():
    assert parse_contenders(["async,stock"]) == ("resident", "stock", "async")  # the limit rests on it
    assert parse_contenders(["mmgp"]) == ("resident", "diffusers-resident", "mmgp")  # so do peers on theirs
    assert parse_contenders(["all"]) == CONTENDERS
    with pytest.raises(BenchError, match="forge: unknown; choose from resident, stock, async"):
        parse_contenders(["async,forge"])


def test_models_and_numbers():
    assert parse_models(["sdxl,tiny", "sdxl"]) == ("sdxl", "tiny")
    with pytest.raises(BenchError, match="flux: unknown"):
        parse_models(["flux"])
    assert parse_numbers(["0.25,1", "4"], "--link-factor", 0.001, 1000) == (0.25, 1, 4)
    for wrong in ("x", "0", "nan", "2000"):
        with pytest.raises(BenchError, match="--link-factor"):
            parse_numbers([wrong], "--link-factor", 0.001, 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "lots"], "--budget lots"),
        (["--contenders", "me"], "--contenders me"),
        (["--model", "sd3"], "--model sd3"),
        (["--batch", "0"], "--batch 0"),
        (["--seconds", "-1"], "--seconds -1"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--device", "mps"], "MPS"),
        (["--suite", "tiny"], "--json-dir"),
        (["--suite", "tiny", "--json-dir", "x", "--model", "sd15"], "--suite takes no --model"),
        (["patching", "--budget", "10%"], "patching takes no --budget"),
        (["loading", "--model", "sdxl"], "loading takes no --model"),
        (["loading", "--from", "x.json"], "cannot be combined"),
        (["--from", "missing.json"], "cannot read missing.json"),
        (["--model", "tiny", "--json", "missing/folder.json"], "cannot write missing/folder.json"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--passes", "0"], ["--rounds", "x"], ["fly"], ["--suite", "huge"]])
def test_wrong_arguments_for_argparse(arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2


def test_the_arguments_are_read_without_torch():
    code = "import sys, lib_async_lowvram.bench.command, lib_async_lowvram.bench.stored; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
