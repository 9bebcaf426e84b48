"""The benchmark at a tiny size on the simulated device: every figure there, outputs equal, peers told as not run. No timing is
judged."""

from __future__ import annotations

import json

import pytest
import torch

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench import case as case_module
from lib_async_lowvram.bench import peers, render, results, stored
from lib_async_lowvram.bench.options import PEER_NAMES, BenchError
from lib_async_lowvram.bench.results import Result

ARGUMENTS = ["bench", "--device", "simulated", "--model", "tiny", "--passes", "1", "--rounds", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One run, with everything it writes."""
    out = tmp_path_factory.mktemp("bench")
    files = ["--json", str(out / "run.json"), "--markdown", str(out / "run.md"), "--png", str(out / "run.png")]
    threads = torch.get_num_threads()
    assert main([*ARGUMENTS, "--budget", "1%,50%", "--budget", "100%,equal", "--link-factor", "1,4", *files]) == 0
    assert torch.get_num_threads() == threads
    return out


@pytest.fixture()
def document(folder):
    return results.read(folder / "run.json")


def test_document(document):
    assert document["schema"] == 3 and document["settings"]["budgets"] == ["1%", "50%", "100%", "equal"]
    environment = document["environment"]
    assert environment["device"] == "simulated" and environment["torch"] == torch.__version__ and environment["ram_bytes"] > 0
    slow, fast = document["cases"]
    assert (slow["link_factor"], fast["link_factor"]) == (1.0, 4.0)
    for case in (slow, fast):
        assert case["workload"]["model"] == "tiny" and not case["workload"]["exact_shape"]
        assert case["rounds"] == 2 and case["passes_per_round"] == 1 and case["dropped"] == []
        assert [entry["contender"] for entry in case["not_run"]] == list(PEER_NAMES)
        assert {entry["reason"] for entry in case["not_run"]} == {"needs a CUDA device"}
    assert document["loading"] == [] and document["notes"] == []


def test_results(document):
    for case in document["cases"]:
        resident, stock, *ours = case["results"]
        assert [result["contender"] for result in case["results"]] == ["resident", "stock", *["async"] * 4]
        assert all(result["bitwise_equal"] for result in case["results"])
        total, bandwidth, compute = case["weight_bytes"], case["bandwidth_bytes_per_s"], case["compute_seconds"]
        assert compute == resident["seconds_per_pass"]
        for result in case["results"]:
            assert result["passes"] == 2
            assert result["iterations_per_second"] == pytest.approx(1 / result["seconds_per_pass"])
            assert result["efficiency"] == pytest.approx(result["limit_seconds"] / result["seconds_per_pass"])
            assert result["stall_seconds"] >= 0 and result["peak_weight_bytes"] > 0
            least, low, high, most = result["spread_seconds"]
            assert least <= low <= result["seconds_per_pass"] <= high <= most
            assert result["peak_device_bytes"] is None and result["launch_seconds"] is None  # nobody can tell here
        for result in ours:
            effective = result["effective_budget_bytes"]
            assert result["peak_weight_bytes"] <= effective
            beside = result["compute_seconds"]  # of the resident model's passes beside this row's own
            assert beside > 0
            assert result["limit_seconds"] == pytest.approx(max(beside, (total - effective) / bandwidth))
            assert result["best_schedule_seconds"] >= 0.999 * result["floor_seconds"] >= 0.998 * result["limit_seconds"]
            assert result["schedule_efficiency"] == pytest.approx(result["best_schedule_seconds"] / result["seconds_per_pass"])
            overhead = result["seconds_per_pass"] - beside - result["stall_seconds"]
            assert result["overhead_seconds"] == pytest.approx(overhead)
            units = result["details"]["hits"] / result["details"]["passes"]
            assert units > 0 and result["overhead_per_unit_seconds"] == pytest.approx(overhead / units)
            assert result["host_pinned_bytes"] >= 0.98 * total and not result["stall_derived"]
            assert result["details"]["misses"] == 0 and result["details"]["host_waits"] == 0
        raised, half, whole, equal = ours
        assert raised["budget_bytes"] == total // 100 < raised["effective_budget_bytes"]  # the least that works
        assert half["budget_bytes"] == half["effective_budget_bytes"] == total // 2
        # 100% is a little less than everything: units are padded on the device.
        assert whole["details"]["streamed_bytes_per_pass"] < half["details"]["streamed_bytes_per_pass"] < total
        assert equal["equal_to"] == "stock" and equal["budget_bytes"] == stock["peak_weight_bytes"] < total // 2
        assert resident["host_pinned_bytes"] == stock["host_pinned_bytes"] == 0
        assert resident["floor_seconds"] is None and stock["floor_seconds"] is None  # nothing is known of their budget
        assert resident["compute_seconds"] == stock["compute_seconds"] == compute
        assert stock["limit_seconds"] == pytest.approx(max(compute, (total - stock["peak_weight_bytes"]) / bandwidth))


def test_tables_and_pictures_from_a_stored_document(folder, tmp_path, capsys):
    files = ["--markdown", str(tmp_path / "again.md"), "--png", str(tmp_path / "again.png")]
    assert main(["bench", "--from", str(folder / "run.json"), *files]) == 0
    page = (tmp_path / "again.md").read_text()
    assert page == (folder / "run.md").read_text()
    assert page.count("| async | ") == 8 and page.count("### tiny, 64x64, batch 2, link x") == 2
    assert "- not run here: mmgp: needs a CUDA device" in page and "(asked 0.1 MB)" in page
    assert (tmp_path / "again.png").read_bytes() == (folder / "run.png").read_bytes()
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "schedule" in printed and printed.count("resident") >= 2


def test_unknown_figures_are_shown_as_such(document):
    for result in document["cases"][0]["results"]:
        result.update({key: None for key in ("limit_seconds", "efficiency", "peak_weight_bytes", "stall_seconds", "host_pinned_bytes")})
    text = render.text(document)
    assert " -" in text and "None" not in text and "nan" not in text


def test_a_row_that_python_bounds_is_marked(document):
    result = document["cases"][0]["results"][2]
    result["launch_seconds"] = 0.95 * result["seconds_per_pass"]
    document["cases"][0]["results"][1]["launch_seconds"] = 1.0  # stock waits while it launches: that says nothing
    text = render.text(document)
    assert text.count("async (Py)") == 1 and "stock (Py)" not in text and "bound by Python" in text


def test_wrong_outputs_are_told(document, tmp_path, capsys):
    document["cases"][1]["results"][3]["bitwise_equal"] = False
    results.write(tmp_path / "wrong.json", document)
    assert main(["bench", "--from", str(tmp_path / "wrong.json")]) == 1
    printed = capsys.readouterr()
    assert "DIFFER" in printed.out and "not bit for bit equal" in printed.err


def test_wrong_pixels_are_found(monkeypatch, tmp_path):
    right = case_module.Async.run_pass
    monkeypatch.setattr(case_module.Async, "run_pass", lambda self, inputs: right(self, inputs) + 1e-6)
    path = tmp_path / "wrong.json"
    assert main([*ARGUMENTS, "--contenders", "async", "--budget", "50%", "--rounds", "1", "--json", str(path)]) == 1
    resident, ours = results.read(path)["cases"][0]["results"]
    assert resident["bitwise_equal"] and not ours["bitwise_equal"]


def test_a_peer_that_fails_is_reported_and_the_others_go_on(monkeypatch, tmp_path):
    """Others' code may raise anything."""
    monkeypatch.setattr(peers, "why_not", lambda name, streams: "")

    def build(shape, weights):
        raise AssertionError("shapes differ\nand more")

    monkeypatch.setattr(case_module.diffusers_unet, "build", build)
    path = tmp_path / "run.json"
    assert main([*ARGUMENTS, "--contenders", "async,accelerate", "--budget", "50%", "--rounds", "1", "--json", str(path)]) == 0
    case = results.read(path)["cases"][0]
    assert [result["contender"] for result in case["results"]] == ["resident", "async"]
    assert case["not_run"] == [
        {"contender": "diffusers-resident", "reason": "failed: AssertionError: shapes differ"},
        {"contender": "accelerate", "reason": "diffusers-resident, which it is compared with, did not run"},
    ]


def test_nobody_to_be_equal_to(tmp_path):
    path = tmp_path / "run.json"
    assert main([*ARGUMENTS, "--contenders", "async", "--budget", "equal", "--rounds", "1", "--json", str(path)]) == 0
    case = results.read(path)["cases"][0]
    assert [result["contender"] for result in case["results"]] == ["resident"]
    assert case["dropped"] == ["async equal: no other contender ran whose device memory is known"]


def test_a_case_that_does_not_fit_is_told(monkeypatch, tmp_path, capsys):
    def run(self):
        raise torch.cuda.OutOfMemoryError("tried to allocate 5 GB\nand more")

    monkeypatch.setattr(case_module.Case, "run", run)
    assert main([*ARGUMENTS, "--json", str(tmp_path / "run.json")]) == 2
    assert "no room for it: tried to allocate 5 GB" in capsys.readouterr().err


def test_round_trip_and_schema(document, tmp_path):
    results.write(tmp_path / "copy.json", document)
    assert results.read(tmp_path / "copy.json") == document
    assert set(document["cases"][0]["results"][0]) == set(Result.__dataclass_fields__)
    for broken, message in (
        ({**document, "schema": 4}, "schema 4"),
        ({**document, "kind": "other"}, "not a result"),
        ({key: value for key, value in document.items() if key != "environment"}, "lacks 'environment'"),
        ({**document, "cases": [{}]}, "case 0 lacks workload"),
        ({**document, "cases": [{**document["cases"][0], "results": [{}]}]}, "a result of case 0 lacks contender"),
        ([], "not a result"),
    ):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(BenchError, match=message):
            results.read(tmp_path / "broken.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(BenchError, match="not JSON"):
        results.read(tmp_path / "broken.json")


def test_older_documents_are_read_and_show_what_they_lack_as_unknown(document, tmp_path):
    for case in document["cases"]:
        for result in case["results"]:
            del result["floor_seconds"], result["compute_seconds"]
    document["schema"] = 1
    results.write(tmp_path / "old.json", document)
    read = results.read(tmp_path / "old.json")
    assert {result["floor_seconds"] for case in read["cases"] for result in case["results"]} == {None}
    assert "None" not in render.markdown(read)
    render.draw(tmp_path / "old.png", read)
    results.write(tmp_path / "new.json", {**document, "schema": results.SCHEMA})
    with pytest.raises(BenchError, match="lacks floor_seconds, compute_seconds"):
        results.read(tmp_path / "new.json")


def test_documents_of_different_devices_are_not_joined(document):
    other = {**document, "environment": {**document["environment"], "device": "cuda:0 Other"}}
    with pytest.raises(BenchError, match="different kinds of device"):
        stored.join([document, other])
    assert len(stored.join([document, document])["cases"]) == 4


def test_an_interrupted_run_keeps_what_it_measured(monkeypatch, tmp_path, capsys):
    real, calls = case_module.Case.run, []

    def run(self):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(case_module.Case, "run", run)
    path = tmp_path / "run.json"
    assert main([*ARGUMENTS, "--rounds", "1", "--budget", "50%", "--batch", "1,2", "--json", str(path)]) == 130
    assert [case["workload"]["batch"] for case in results.read(path)["cases"]] == [1]
