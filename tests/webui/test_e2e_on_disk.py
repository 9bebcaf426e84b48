"""Weights kept on disk in the real WebUI: stock's pictures, with LoRA and another checkpoint too. Set up and run as `test_e2e_lora`, with
checkpoints in the precision that the servers compute in (float32 with --no-half)."""

from __future__ import annotations

import pytest
from lora_fixtures import NEEDS_SERVERS
from lora_pair import job

pytestmark = NEEDS_SERVERS

LORA = "<lora:e2e-one:1>"


@pytest.fixture
def on_disk(pair):
    pair.ours.set_options(async_lowvram_on_disk=True)
    pair.run("on disk, at first", job())
    if "converted" in pair.ours.status()["on_disk"]["why_not"]:
        pair.ours.set_options(async_lowvram_on_disk=False)
        pytest.skip("this server's checkpoints are in another precision than it computes in: give it some in the same")
    yield pair
    pair.ours.set_options(async_lowvram_on_disk=False)
    pair.run("in memory again", job())
    assert pair.ours.status()["on_disk"] is None and pair.ours.status()["file_bytes"] == 0


def kept(pair):
    """(bytes in the file, of all, that units still take from it, of main memory for masters)"""
    status = pair.ours.status()
    assert status["state"] == "active" and status["placement_faults"] == 0, status["last_error"]
    return status["on_disk"]["in_file_bytes"], status["on_disk"]["of_bytes"], status["file_bytes"], status["host_bytes"]


def test_the_same_pictures(on_disk):
    for number in range(3):
        on_disk.run(f"on disk {number}", job(prompt=on_disk.unheard_of(number)))
    found, of, file, host = kept(on_disk)
    print(f"\n{found} of {of} bytes in the checkpoint, {file} of them in units; masters {host}")
    assert found > 0.9 * of and file > 0.9 * found and host < of / 2
    first = on_disk.ours.status()
    on_disk.run("on disk again", job())
    after = on_disk.ours.status()
    read, streamed = (after[name] - first[name] for name in ("file_read_bytes", "streamed_bytes"))
    assert read > 0.9 * streamed or not on_disk.streamed
    print(f"read {read}, streamed {streamed} bytes for a picture")


def test_a_lora_and_without_it_again(on_disk):
    on_disk.run("on disk, before", job())
    before = kept(on_disk)
    for number in range(2):
        on_disk.run(f"on disk, LoRA {number}", job(LORA))
        during = kept(on_disk)
        assert 0 < during[2] < before[2] and during[3] > before[3]
    on_disk.run("on disk, without it", job())
    print(f"\nbytes of units in the file {before[2]} -> {during[2]}, masters {before[3]} -> {during[3]}")


def test_another_checkpoint_in_its_place_and_back(on_disk):
    """Its values are memory during that job, and its file's from the next one on."""
    same = [title for title in on_disk.others if title in on_disk.same_config]
    assert same
    on_disk.run("on disk, first", job())
    for title in (same[0], on_disk.checkpoint):
        on_disk.set_options(sd_model_checkpoint=title)
        for number in range(2):
            on_disk.run(f"on disk, {title}, {number}", job())
        found, of, file, _ = kept(on_disk)
        assert found > 0.9 * of and file > 0.9 * found, title
