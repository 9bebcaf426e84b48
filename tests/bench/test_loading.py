"""Unloading and loading: SDXL's components have the published sizes, both contenders give the same bits, and the mover loads
everything once and writes nothing back."""

from __future__ import annotations

import json

import pytest
import torch

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench import loading, results
from lib_async_lowvram.bench.deadline import Deadline
from lib_async_lowvram.bench.loading import Components, measure_loading
from lib_async_lowvram.bench.options import BenchError
from lib_async_lowvram.bench.regions import measure_pictures, measure_regions
from lib_async_lowvram.device.simulated import SimulatedStreams


def test_components_have_the_parameters_of_sdxl():
    assert Components.sdxl().parameters() == {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    }


@pytest.fixture()
def few(monkeypatch):
    """Some layers of each component."""
    whole = Components.sdxl(1 / 1024).layers
    return Components({name: layers[:: max(1, len(layers) // 12)] for name, layers in whole.items()})


@pytest.fixture()
def device():
    device = SimulatedStreams(capacity_bytes=1 << 30)
    yield device
    device.close()


def test_both_load_and_unload(few, device):
    stock, ours = measure_loading(device, few, rounds=2, seed=0, deadline=Deadline(None))
    total = sum(few.parameters().values()) * 2
    for result in (stock, ours):
        assert result["weight_bytes"] == total == sum(result["components"].values())
        assert result["bitwise_equal"] and result["rounds"] == 2
        assert result["load_seconds"] > 0 and result["unload_seconds"] >= 0
        assert result["share_of_link"] == pytest.approx(total / result["load_seconds"] / result["bandwidth_bytes_per_s"])
    assert [stock["contender"], ours["contender"]] == ["stock", "async"]


def test_the_output_depends_on_every_parameter(few):
    model = few.build(0, torch.device("cpu")).float().requires_grad_(True)
    model(torch.zeros(1)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad[0] > 0 and parameter.grad[-1] > 0, name


def test_the_mover_unloads_without_copying_and_loads_everything_once(few, device, monkeypatch):
    moved = {"onload": 0, "offload": 0}

    def on_copy(lane, start, end, nbytes):
        moved[lane] += nbytes

    loads = []
    real = loading._timed

    def timed(load, unload, streams, rounds, deadline):
        real(load, unload, streams, 1, deadline)
        streams.on_copy = on_copy
        load()
        unload()
        streams.on_copy = None
        loads.append(dict(moved))
        return real(load, unload, streams, rounds, deadline)

    monkeypatch.setattr(loading, "_timed", timed)
    stock, ours = measure_loading(device, few, rounds=1, seed=0, deadline=Deadline(None))
    by_stock, by_both = loads
    total = stock["weight_bytes"]
    assert by_stock["onload"] == by_stock["offload"] == total
    assert by_both["offload"] == by_stock["offload"]  # nothing was written back
    assert total <= by_both["onload"] - by_stock["onload"] <= 1.2 * total + 512 * len(list(few.build(0, torch.device("cpu")).parameters()))


def test_the_command(monkeypatch, tmp_path, capsys, few):
    monkeypatch.setattr(Components, "sdxl", classmethod(lambda cls, scale=1.0: few))
    path = tmp_path / "loading.json"
    assert main(["bench", "loading", "--device", "simulated", "--rounds", "1", "--json", str(path)]) == 0
    document = results.read(path)
    assert document["cases"] == [] and [result["contender"] for result in document["loading"]] == ["stock", "async"]
    assert len(document["regions"]) == 6 and len(document["pictures"]) == 3
    told = capsys.readouterr().out
    assert "share of link" in told and "Unloading and loading each region" in told and "async-ahead" in told
    assert main(["bench", "--from", str(path), "--png", str(tmp_path / "x.png")]) == 2
    assert "no cases to draw" in capsys.readouterr().err
    document["loading"][1]["bitwise_equal"] = False
    path.write_text(json.dumps(document))
    assert main(["bench", "--from", str(path)]) == 1


def test_each_region_loads_and_unloads(few, device):
    found = measure_regions(device, few, rounds=2, seed=0, deadline=Deadline(None))
    assert [(result["region"], result["contender"]) for result in found] == [
        (region, contender) for region in ("text", "unet", "vae") for contender in ("stock", "async")
    ]
    sizes = few.parameters()
    assert found[0]["weight_bytes"] == 2 * (sizes["text_encoder"] + sizes["text_encoder_2"])
    assert found[2]["weight_bytes"] == 2 * sizes["unet"] and found[4]["weight_bytes"] == 2 * sizes["vae"]
    for result in found:
        assert result["bitwise_equal"] and result["rounds"] == 2
        assert result["load_seconds"] > 0 and result["unload_seconds"] >= 0


def test_a_pictures_turn_finds_unet_and_vae_fetched(few, device):
    stock, plain, ahead = measure_pictures(device, few, rounds=2, seed=0, deadline=Deadline(None))
    assert [result["contender"] for result in (stock, plain, ahead)] == ["stock", "async", "async-ahead"]
    for result in (stock, plain, ahead):
        assert result["bitwise_equal"] and result["rounds"] == 2 and result["seconds"] > 0
        assert result["compute_seconds"].keys() == {"text", "unet", "vae"}
    assert (stock["fetched_ahead_bytes"], plain["fetched_ahead_bytes"]) == (0, 0)
    sizes = few.parameters()
    assert ahead["fetched_ahead_bytes"] >= 2 * (sizes["unet"] + sizes["vae"])  # of the packed units, which are a little larger
    assert ahead["weight_bytes"] == 2 * sum(sizes.values())


def test_one_round_where_there_is_no_time(few, device):
    for result in measure_pictures(device, few, rounds=3, seed=0, deadline=Deadline(0.0)):
        assert result["rounds"] == 1


def test_a_document_of_schema_1_measured_no_regions(tmp_path):
    document = {key: [] for key in ("created", "environment", "settings", "cases", "loading", "notes")}
    document.update(kind=results.KIND, schema=1)
    results.write(tmp_path / "old.json", document)
    read = results.read(tmp_path / "old.json")
    assert read["regions"] == read["pictures"] == [] and results.all_equal(read)
    read["pictures"].append({"bitwise_equal": False})
    assert not results.all_equal(read)
    document["schema"] = results.SCHEMA
    results.write(tmp_path / "new.json", document)
    with pytest.raises(BenchError, match="lacks 'regions'"):
        results.read(tmp_path / "new.json")
