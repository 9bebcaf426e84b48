"""Large pictures, job by job: what is asked for is carried out, or said under the picture."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.large.settings import ON, LargePictures
from lib_async_lowvram.webui.large_jobs import LargeJobs, room

MIB = 1 << 20


class Denoise:
    def __init__(self):
        self.calls = []

    def begin(self, p, settings):
        self.calls.append(settings)

    def end(self):
        self.calls.append(None)

    def status(self):
        return {"mode": "On"}


class Processing:
    def __init__(self):
        self.comments, self.extra_generation_params = [], {}

    def comment(self, text):
        self.comments.append(text)


@pytest.fixture
def jobs():
    return LargeJobs(Denoise(), lambda: "")


def test_on(jobs):
    p = Processing()
    jobs.begin(p, (ON, 512, 0, None))
    assert jobs._denoise.calls == [None, LargePictures(ON, 512)]
    assert p.extra_generation_params == {"Large pictures": "On", "Large tile": 512} and not p.comments
    assert jobs.settings == LargePictures(ON, 512) and jobs.status() == {"mode": "On", "vae": ""}
    jobs.end()
    assert jobs._denoise.calls[-1] is None and jobs.settings.off


def test_off_does_nothing_but_end_what_was(jobs):
    p = Processing()
    jobs.begin(p, ("Off", 512, 0, None))
    assert jobs._denoise.calls == [None]
    assert p.extra_generation_params == {} and not p.comments


def test_what_was_replaced_is_said_under_the_picture(jobs):
    p = Processing()
    jobs.begin(p, (ON, 500, 0, None))
    assert p.comments == ["Large pictures: tile 500 became 512 (from 256 to 4096, in steps of 64)"]
    assert jobs.settings.tile == 512


def test_what_cannot_be_read_is_said_and_left_out(jobs):
    p = Processing()
    jobs.begin(p, (ON, 0, 0, [{"x": 2}]))
    assert len(p.comments) == 1 and "region 1" in p.comments[0] and "made without" in p.comments[0]
    assert jobs.settings.off and jobs._denoise.calls == [None] and p.extra_generation_params == {}


def test_not_where_weights_do_not_travel():
    jobs = LargeJobs(Denoise(), lambda: "switched off in Settings")
    p = Processing()
    jobs.begin(p, (ON,))
    assert p.comments == ["Large pictures: switched off in Settings; made without tiles and regions"]
    assert jobs._denoise.calls == [None]


def test_the_plots_own_settings_count_instead(jobs):
    p = Processing()
    p.async_lowvram_large = {"mode": "on", "tile": 768}
    jobs.begin(p, ("Off", 512, 0, None))
    assert jobs.settings == LargePictures(ON, 768)


@pytest.mark.parametrize(("budget", "expected"), [(0, 800 - 200 - 100), (300, 800 - 300 - 100), (790, 0)])
def test_room_for_activations(budget, expected):
    streams = SimpleNamespace(free_memory=lambda: 700 * MIB, allocated_bytes=100 * MIB)
    assert room(streams, OffloadConfig(budget_bytes=budget * MIB)) == expected * MIB
