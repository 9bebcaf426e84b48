"""The advice, by figures: one situation per row, the sentence it makes; and none where a figure is not known."""

from __future__ import annotations

import re

import pytest

from lib_async_lowvram.webui.advice import MB, TEXTS, Host, advise, fill

GOOD = {
    "state": "active",
    "bound": "compute",
    "pass_seconds": 0.200,
    "limit_seconds": 0.190,
    "best_schedule_seconds": 0.195,
    "efficiency": 0.95,
    "schedule_efficiency": 0.975,
    "stall_seconds": 0.0,
    "streamed_bytes_per_pass": 600 * MB,
    "bandwidth_bytes_per_s": 10e9,
    "budget_bytes": 1000 * MB,
    "vram": {"total": 4096 * MB, "resident": 900 * MB, "ring": 100 * MB, "activations": 900 * MB, "others": 200 * MB, "free": 1996 * MB},
    "retries": 0,
    "unpinned_bytes": 0,
}
COPY = {**GOOD, "bound": "copy", "pass_seconds": 0.300, "stall_seconds": 0.060, "best_schedule_seconds": 0.29, "limit_seconds": 0.28}
FULL = {**GOOD["vram"], "free": 50 * MB}


def said(status, host=None) -> list[str]:
    return [fill(advice) for advice in advise(status, host or Host())]


# fmt: off
ROWS = [
    (GOOD, Host(), "Compute-bound: weights arrive in time, 95% of the fastest possible. Nothing to change."),
    ({**COPY, "stall_seconds": 0.001}, Host(), "At 98% of the best schedule for this budget. Nothing to change."),
    (
        {**GOOD, "pass_seconds": 0.3, "efficiency": 0.63, "schedule_efficiency": 0.65}, Host(),
        "Steps take 300 ms where 195 ms were planned, and not for copies: other programs on the GPU or the CPU may hold them up.",
    ),
    # 60 ms at 10 GB/s are 573 MB, in steps of 256
    (COPY, Host(budget_bytes=1000 * MB), "Copy-bound: 768 MB more budget would save about 60 ms per step."),
    # no more than is free, less what stays so
    (
        {**COPY, "vram": {**GOOD["vram"], "free": 900 * MB}}, Host(budget_bytes=1000 * MB),
        "Copy-bound: 256 MB more budget would save about 27 ms per step.",
    ),
    # automatic: the budget is what is free already
    (
        {**COPY, "vram": {**FULL, "others": 700 * MB}}, Host(),
        "Copy-bound: other programs hold 700 MB of VRAM; without them a step could take about 60 ms less.",
    ),
    (
        {**COPY, "vram": FULL}, Host(),
        "Copy-bound: a step takes as long as its copies, so a batch twice as large would take about 60% longer, not 100%.",
    ),
    (
        COPY, Host(batches_cond_uncond=False),
        "“Batch cond/uncond” is off: every step moves the weights twice, about 63 ms of it for nothing. "
        "Switch it on in Settings, Optimizations.",
    ),
    (
        {**GOOD, "retries": 2}, Host(),
        "VRAM ran out 2 times and steps had to be repeated: lower “VRAM budget for weights” to 744 MB.",
    ),
    (
        {**GOOD, "unpinned_bytes": 300 * MB, "pinned_bytes": 900 * MB, "pinned_limit_bytes": 1000 * MB}, Host(),
        "300 MB of weights could not be locked in main memory and travel more slowly: raise “Pinned memory limit”.",
    ),
    (
        {**GOOD, "unpinned_bytes": 300 * MB, "pinned_bytes": 900 * MB, "pinned_limit_bytes": 9000 * MB}, Host(),
        "300 MB of weights could not be locked in main memory and travel more slowly: close other programs, or restart the computer.",
    ),
    (
        {**COPY, "disk": {"read_bytes": 1, "bytes_per_s": 2.5e9}, "vram": FULL}, Host(),
        "Disk-bound: weights come from disk at 2.5 GB/s, and the bus carries 10.0 GB/s. With enough main memory, switch "
        "“Keep weights on disk” off.",
    ),
    (
        {**GOOD, "pass_seconds": 2.0, "vram": FULL}, Host(windows=True),
        "Steps take 10.3 times as long as planned while VRAM is full: Windows may be using main memory in its place. Set “CUDA - "
        "Sysmem Fallback Policy” to “Prefer No Sysmem Fallback” in the NVIDIA Control Panel, or lower the VRAM budget.",
    ),
    (
        {**COPY, "vram": FULL}, Host(lookahead_bytes=64 * MB),
        "Copies come late by 60 ms per step with a lookahead buffer set to 64 MB: 0 lets the extension choose.",
    ),
    (
        {"state": "learning"}, Host(),
        "Make one picture: the first step of each network is watched, from the second one on weights travel ahead.",
    ),
    (
        {"state": "demoted"}, Host(),
        "It gave way to stock moving. Switch the first option off and on, or restart the WebUI, to try again; if it happens again, copy "
        "the report and open an issue.",
    ),
    ({"state": "standing_down"}, Host(restart=True), "The extension was updated: restart the WebUI to use the new version."),
]
# fmt: on


@pytest.mark.parametrize("status, host, expected", ROWS)
def test_the_sentence(status, host, expected):
    assert said(status, host)[0] == expected


@pytest.mark.parametrize("missing", sorted(set(GOOD) - {"state"}))
@pytest.mark.parametrize("base", [GOOD, COPY, {**COPY, "vram": FULL, "retries": 1, "unpinned_bytes": 300 * MB}])
@pytest.mark.parametrize("host", [Host(), Host(1000 * MB, 64 * MB, False, "Doggettx", True, True)])
def test_a_figure_that_is_not_known_makes_no_nonsense(missing, base, host):
    for nothing in ({**base, missing: None}, {key: value for key, value in base.items() if key != missing}):
        for sentence in said(nothing, host):
            assert not re.search(r"None|nan|inf\b|-\d", sentence)


def test_slicing_is_told_beside_the_rest():
    told = said(GOOD, Host(slicing="Doggettx"))
    assert told[0].startswith("Doggettx attention slices by free memory") and told[1].startswith("Compute-bound")


def test_nothing_is_advised_where_there_is_nothing_to_do():
    assert said({"state": "standing_down"}) == []


def test_not_said_without_reason():
    for status, host, absent in (
        ({**GOOD, "pass_seconds": 2.0, "vram": FULL}, Host(), "sysmem_fallback"),  # not Windows
        ({**GOOD, "pass_seconds": 2.0}, Host(windows=True), "sysmem_fallback"),  # VRAM is not full
        ({**COPY, "streamed_bytes_per_pass": 0}, Host(batches_cond_uncond=False), "cond_uncond"),  # all resident
        (COPY, Host(batches_cond_uncond=None), "cond_uncond"),
        ({**COPY, "disk": {"read_bytes": 1, "bytes_per_s": 9e9}}, Host(), "slow_disk"),
        ({**GOOD, "unpinned_bytes": 300 * MB, "on_disk": {"in_file_bytes": 5}}, Host(), "unpinned"),  # these are on disk on purpose
    ):
        assert absent not in [advice["id"] for advice in advise(status, host)]


def test_every_text_has_a_row():
    told = {advice["id"] for status, host, _ in [*ROWS, (GOOD, Host(slicing="Doggettx"), "")] for advice in advise(status, host)}
    assert told == set(TEXTS)
