"""The benchmark on a real GPU, at a tiny size: what only CUDA's paths fill in. Skipped without one."""

from __future__ import annotations

import pytest

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench import results
from lib_async_lowvram.bench.devices import measure_link
from lib_async_lowvram.device.choose import open_streams

pytestmark = pytest.mark.gpu


def test_tiny_on_a_gpu(tmp_path):
    path = tmp_path / "run.json"
    arguments = ["bench", "--device", "cuda", "--model", "tiny", "--budget", "50%,equal", "--passes", "2", "--rounds", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    document = results.read(path)
    environment = document["environment"]
    assert not environment["simulated"] and environment["device_bytes"] > 0
    case = document["cases"][0]
    found = {result["contender"]: result for result in case["results"]}
    assert {"resident", "stock", "async"} <= set(found)
    for result in found.values():
        assert result["bitwise_equal"], result["contender"]
        assert result["peak_device_bytes"] > 0 and 0 < result["launch_seconds"] <= result["seconds_per_pass"] * 1.001
    assert found["async"]["peak_weight_bytes"] <= found["async"]["effective_budget_bytes"]
    assert found["stock"]["peak_device_bytes"] < found["resident"]["peak_device_bytes"]
    for entry in case["not_run"]:
        assert "not installed" in entry["reason"] or "diffusers-resident" in entry["reason"], entry


def test_loading_on_a_gpu(tmp_path, monkeypatch):
    from lib_async_lowvram.bench.loading import Components

    whole = Components.sdxl
    monkeypatch.setattr(Components, "sdxl", classmethod(lambda cls, scale=1.0: whole(1 / 256)))
    path = tmp_path / "run.json"
    assert main(["bench", "loading", "--device", "cuda", "--rounds", "1", "--json", str(path)]) == 0
    assert all(result["bitwise_equal"] for result in results.read(path)["loading"])


def test_the_link_is_measured():
    streams = open_streams("cuda")
    assert measure_link(streams, 16 << 20) > 1e8
    assert streams.allocated_bytes == 0
    streams.close()
