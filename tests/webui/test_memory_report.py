"""Where memory goes, by region: from the status's figures."""

from __future__ import annotations

from lib_async_lowvram.webui import memory_report, status

NETWORKS = {
    "text": {"weight_bytes": 100, "peak_weight_bytes": 90, "peak_activation_bytes": None, "pinned_bytes": 100},
    "text_2": {"weight_bytes": 200, "peak_weight_bytes": 20, "peak_activation_bytes": None, "pinned_bytes": 0},
    "unet": {"weight_bytes": 1000, "peak_weight_bytes": 400, "peak_activation_bytes": 700, "pinned_bytes": 900},
    "unet#2": {"weight_bytes": 1000, "peak_weight_bytes": 500, "peak_activation_bytes": 600, "pinned_bytes": 0},
    "vae_encode": {"weight_bytes": 30, "peak_weight_bytes": 30, "peak_activation_bytes": None, "pinned_bytes": 30},
    "vae_decode": {"weight_bytes": 50, "peak_weight_bytes": 50, "peak_activation_bytes": 2000, "pinned_bytes": 50},
    "depth_model": {"weight_bytes": 7, "peak_weight_bytes": 7, "peak_activation_bytes": None, "pinned_bytes": 7},
}


def test_by_region() -> None:
    memory = status.complete({"networks": NETWORKS, "preview": {"peak_weight_bytes": 8}})["memory"]
    keys = ("device_weights", "device_activations", "host_weights", "host_pinned")
    found = {name: tuple(region.get(key) for key in keys) for name, region in memory.items()}
    process = memory.pop("process")
    assert {name: found[name] for name in memory} == {
        "text encoder": (90, None, 300, 100),
        "UNet": (500, 700, 2000, 900),
        "VAE": (50, 2000, 80, 80),
        "depth_model": (7, None, 7, 7),
        "previews": (8, None, None, None),
    }
    assert set(process) == {"host_peak"}


def test_nothing_is_known_yet() -> None:
    assert status.complete({})["memory"]["previews"] == {"device_weights": 0}


def test_a_process_has_used_memory() -> None:
    peak = memory_report.process()["host_peak"]
    assert peak is None or peak > 10 << 20
