"""The status: always the same keys, always JSON, never a path."""

from __future__ import annotations

import json
import math

import pytest

from lib_async_lowvram.webui import status

KEYS = """version state reason device budget_bytes resident_bytes ring_bytes pinned_bytes pinned_limit_bytes passes hits misses refetches
write_backs adopted streamed_bytes_per_pass bandwidth_bytes_per_s pass_seconds stall_seconds limit_seconds best_schedule_seconds efficiency
schedule_efficiency bound preview last_error""".split()


def test_every_key_even_when_nothing_is_known():
    answer = status.complete({})
    assert set(KEYS) <= set(answer)
    assert set(answer["preview"]) == {"decoded", "skipped", "decode_seconds", "errors", "peak_weight_bytes"}
    json.dumps(answer, allow_nan=False)


def test_what_is_known_wins_and_more_is_passed_on():
    answer = status.complete({"state": "active", "hits": 3, "networks": {"unet": {"passes": 2}}})
    assert (answer["state"], answer["hits"], answer["networks"]) == ("active", 3, {"unet": {"passes": 2}})


def test_nothing_json_cannot_hold():
    answer = status.complete({"efficiency": math.nan, "networks": {1: {"passes": (math.inf, {2}, object)}}})
    assert answer["efficiency"] is None
    json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize(
    "message",
    [
        "FileNotFoundError: '/home/anna/models/secret.safetensors' is missing",
        r"OSError: C:\Users\Anna\models\secret.safetensors",
        "/home/anna/secret.ckpt",
        "cannot open (/srv/secret.ckpt)",
    ],
)
def test_no_paths(message):
    answer = status.complete({"last_error": message})
    assert "secret" not in answer["last_error"]
    assert "<path>" in answer["last_error"]


def test_plain_text_stays():
    text = "half of 1/2 GB at 3 MB/s; and/or nothing"
    assert status.complete({"reason": text})["reason"] == text
