"""Options hold whatever somebody stored; the reader makes sizes of it, and says so once."""

from __future__ import annotations

import math

import pytest

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.webui import settings
from lib_async_lowvram.webui.settings import ALWAYS_WRITE_BACK, ENABLED, FULL_PREVIEW_BYTES, ON_DISK, PREFIX, PREVIEWS, SettingsReader

MIB = 1 << 20


def reader(values):
    return SettingsReader(lambda: values, {})


def test_registered_with_a_text_people_understand(webui):
    settings.register()
    labels = webui.shared.opts.data_labels
    # In this order on the page: what most users may want first.
    sizes = {key: PREFIX + key for key in settings.SIZES}
    ordered = [ENABLED, sizes["budget_mb"], sizes["lookahead_mb"], PREVIEWS, sizes["pinned_mb"], ON_DISK, ALWAYS_WRITE_BACK]
    assert list(labels) == ordered
    for option in labels.values():
        assert option.section == ("async_lowvram", "Async LowVRAM")
        assert option.category_id == "sd"
        assert 80 < len(option.comment_after) < 180, "a text that nobody reads to its end"
        # The host takes it for HTML; localisation files have it as plain text.
        assert not set("<>&") & set(option.comment_after)
    assert webui.data[ENABLED] is True
    assert webui.data[PREVIEWS] is True
    assert webui.data[ALWAYS_WRITE_BACK] is webui.data[ON_DISK] is False
    assert [webui.data[PREFIX + key] for key in settings.SIZES] == [0, 0, 0]
    assert [labels[PREFIX + key].component_args["maximum"] for key in settings.SIZES] == [4096, 24576, 65536]


def test_registering_keeps_what_the_user_chose(webui):
    webui.data[ENABLED] = False
    settings.register()
    assert webui.data[ENABLED] is False


def test_before_registration_the_defaults_hold(webui):
    fresh = SettingsReader()
    assert fresh.enabled() is True
    assert fresh.config() == OffloadConfig()


def test_sizes_are_megabytes():
    config = reader({PREFIX + "lookahead_mb": 64, PREFIX + "budget_mb": 1.5, PREFIX + "pinned_mb": "128"}).config()
    assert config == OffloadConfig(lookahead_bytes=64 * MIB, budget_bytes=MIB * 3 // 2, pinned_limit_bytes=128 * MIB)


@pytest.mark.parametrize(("value", "meant"), [(True, True), (1, True), (False, False), ("abc", False), (None, False), (7, False)])
def test_always_write_back(value, meant, said):
    values = {ALWAYS_WRITE_BACK: value}
    read = reader(values)
    assert read.config() == OffloadConfig(always_write_back=meant)
    assert said().count(ALWAYS_WRITE_BACK) == (value not in (0, 1))
    values[ALWAYS_WRITE_BACK] = not meant
    assert read.config() == OffloadConfig(always_write_back=not meant)


def test_on_disk_is_not_for_changes_that_leave_no_trace(said):
    assert not reader({}).on_disk() and reader({ON_DISK: True}).on_disk()
    assert not reader({ON_DISK: True, ALWAYS_WRITE_BACK: True}).on_disk()
    assert "switch it off to keep them on disk" in said()


FULL = {"show_progress_type": "Full", "live_preview_allow_lowvram_full": True}


@pytest.mark.parametrize(
    ("values", "reserved"),
    [
        (FULL, FULL_PREVIEW_BYTES),
        ({**FULL, "live_previews_enable": False}, 0),
        ({**FULL, "live_preview_allow_lowvram_full": False}, 0),
        ({**FULL, "show_progress_type": "Approx NN"}, 0),
        ({**FULL, PREVIEWS: False}, 0),
        ({}, 0),
    ],
)
def test_full_previews_take_their_part_of_the_budget(values, reserved):
    assert reader(values).config() == OffloadConfig(preview_bytes=reserved)


@pytest.mark.parametrize("hostile", ["abc", -5, None, math.nan, True, [], {}, "", -math.inf, b"12", "9" * 5000 + "x"])
def test_hostile_sizes_mean_automatic(hostile, said):
    config = reader({PREFIX + key: hostile for key in settings.SIZES}).config()
    assert config == OffloadConfig()
    for key in settings.SIZES:
        assert said().count(PREFIX + key) == 1
    assert len(said()) < 2000


@pytest.mark.parametrize("huge", [1e9, math.inf, 10**400])
def test_huge_sizes_are_lowered_to_the_slider(huge, said):
    config = reader({PREFIX + "lookahead_mb": huge}).config()
    assert config.lookahead_bytes == 4096 * MIB
    assert "4096" in said()


def test_each_odd_value_is_told_once(said):
    values = {PREFIX + "budget_mb": "abc"}
    ours = reader(values)
    for _ in range(3):
        ours.config()
    values[PREFIX + "budget_mb"] = 0
    ours.config()
    values[PREFIX + "budget_mb"] = "abc"
    ours.config()
    assert said().count("'abc'") == 1
    values[PREFIX + "budget_mb"] = "abd"
    ours.config()
    assert said().count("'abd'") == 1


def test_a_flood_of_odd_values_does_not_grow_us():
    values = {}
    ours = reader(values)
    for number in range(1000):
        values[PREFIX + "budget_mb"] = f"x{number}"
        ours.config()
    assert len(ours._told) <= 64


def test_unchanged_values_give_the_same_object():
    values = {PREFIX + "budget_mb": 100, PREFIX + "pinned_mb": math.nan}
    ours = reader(values)
    first = ours.config()
    assert ours.config() is first
    values[PREFIX + "budget_mb"] = 101
    assert ours.config().budget_bytes == 101 * MIB


def test_one_is_a_size_and_true_is_not(said):
    values = {PREFIX + "budget_mb": 1}
    ours = reader(values)
    assert ours.config().budget_bytes == MIB
    values[PREFIX + "budget_mb"] = True
    assert ours.config().budget_bytes == 0


@pytest.mark.parametrize(("raw", "wanted"), [(True, True), (False, False), (1, True), (0, False), (0.0, False)])
def test_enabled(raw, wanted):
    assert reader({ENABLED: raw}).enabled() is wanted


@pytest.mark.parametrize("hostile", ["abc", None, [], 7, math.nan, "false"])
def test_a_hostile_switch_is_on(hostile, said):
    ours = reader({ENABLED: hostile})
    assert ours.enabled() is True
    assert ours.enabled() is True
    assert said().count(ENABLED) == 1


def test_placement_is_checked_on_request():
    assert SettingsReader(dict, {settings.CHECK_PLACEMENT_VARIABLE: "1"}).config().check_placement is True
    assert SettingsReader(dict, {}).config().check_placement is False
