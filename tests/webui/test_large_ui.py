"""Large pictures asked for in the form, the API, the X/Y/Z plot and a picture's text: the same settings."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from lib_async_lowvram.large.regions import Region
from lib_async_lowvram.large.settings import AUTOMATIC, OFF, ON, LargePictures
from lib_async_lowvram.webui import large_ui

TREE = {"x": 0.0, "y": 0.25, "width": 0.5, "height": 0.75, "prompt": 'a "tree", old:\nand tall', "negative": "leaves", "weight": 1.5}
LAKE = {"x": 0.5, "y": 0.0, "width": 0.5, "height": 1.0, "prompt": "a lake"}
ROWS = [[0, 0.25, 0.5, 0.75, TREE["prompt"], "leaves", 1.5], [0.5, 0, "0.5", "1", "a lake", "", ""], [None] * 7, [""] * 7]
SETTINGS = LargePictures(ON, 512, 128, (Region(**TREE), Region(**LAKE)))


@pytest.mark.parametrize(
    "args",
    [
        (ON, 512, 128, ROWS),
        (ON, 512, 128, {"headers": list(large_ui.COLUMNS), "data": ROWS}),
        ("on", "512", 128.0, [TREE, LAKE]),
        ({"mode": ON, "tile": 512, "overlap": 128, "regions": [TREE, LAKE]},),
    ],
)
def test_every_way_means_the_same(args: tuple) -> None:
    assert large_ui.asked(args) == (SETTINGS, ())


@pytest.mark.parametrize("args", [(), (OFF,), (None, None, None, None), (OFF, 512, 128, ROWS), ({},)])
def test_off_asks_for_nothing_and_writes_nothing(args: tuple) -> None:
    settings, notes = large_ui.asked(args)
    assert settings == LargePictures() and not notes
    assert large_ui.infotext_of(settings) == {}


def test_the_api_may_send_fewer() -> None:
    assert large_ui.asked(("Automatic",))[0] == LargePictures(AUTOMATIC)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("loud",), "none of Off"),
        ((ON, 0, 0, [[0, 0, 1]]), "region 1 has 3 columns of 7"),
        ((ON, 0, 0, [[0, 0, 1, 1, "", "", 1]]), "prompt is a text"),
        ((ON, 0, 0, [["left", 0, 1, 1, "a", "", 1]]), "x is a number"),
        ((ON, 0, 0, "{"), "not JSON"),
        (({"mode": ON, "size": 3},), "no setting 'size'"),
    ],
)
def test_what_cannot_be_read_says_why(args: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        large_ui.asked(args)


def test_a_pictures_text_brings_it_back() -> None:
    text = large_ui.infotext_of(SETTINGS)
    assert list(text) == ["Large pictures", "Large tile", "Large overlap", "Large regions"]
    controls = ["mode", "tile", "overlap", "regions"]
    restored = [read(text) for _, read in large_ui.infotext_fields(controls)]
    assert dict(restored[3])["headers"] == list(large_ui.COLUMNS)  # the host makes of it what the table's own value is
    assert large_ui.asked(restored) == (SETTINGS, ())
    assert [control for control, _ in large_ui.infotext_fields(controls)] == controls


def test_a_picture_without_it_switches_it_off() -> None:
    restored = [read({"Steps": 20}) for _, read in large_ui.infotext_fields(["mode", "tile", "overlap", "regions"])]
    assert restored[0] == OFF
    assert large_ui.asked(restored)[0] == LargePictures()


def test_a_text_that_holds_nonsense_is_an_empty_table() -> None:
    assert large_ui.rows_of("{") == large_ui.rows_of([{"x": 1}]) == large_ui.rows_of(None) == [[None] * 7]


def test_the_controls_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host's gradio is asked for them; a real server shows them in the end-to-end tests."""
    made: list[tuple[str, dict]] = []

    class Component:
        def __init__(self, *args: object, **kwargs: object) -> None:
            made.append((type(self).__name__, kwargs))

        def __enter__(self) -> None:
            pass

        def __exit__(self, *exception: object) -> None:
            pass

    names = ("Accordion", "Radio", "Row", "Slider", "Dataframe")
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(**{name: type(name, (Component,), {}) for name in names}))
    controls, fields = large_ui.accordion(lambda name: f"txt2img_{name}")
    assert [type(control).__name__ for control in controls] == ["Radio", "Slider", "Slider", "Dataframe"]
    assert [control for control, _ in fields] == controls
    assert [kwargs["elem_id"] for name, kwargs in made if name != "Row"] == [
        f"txt2img_large{part}" for part in ("", "_mode", "_tile", "_overlap", "_regions")
    ]
    assert dict(made)["Dataframe"]["value"] == [[None] * 7]  # empty, and so off


class AxisOption:
    def __init__(self, label, type, apply, choices=None):
        self.label, self.type, self.apply, self.choices = label, type, apply, choices


def test_the_plot_has_our_axes_once() -> None:
    plot = SimpleNamespace(axis_options=[AxisOption("Seed", int, None)], AxisOption=AxisOption)
    loaded = [SimpleNamespace(path="scripts/loopback.py", module=None), SimpleNamespace(path="scripts/xyz_grid.py", module=plot)]
    assert large_ui.add_axes(loaded) == 1
    assert large_ui.add_axes(loaded) == 0
    mode, tile, overlap = plot.axis_options[1:]
    assert mode.choices() == ["Off", "Automatic", "On"] and (tile.type, overlap.choices) == (int, None)
    p = SimpleNamespace()
    mode.apply(p, "On", ["Off", "On"])
    before = p.async_lowvram_large
    tile.apply(p, 768, [512, 768])
    assert before == {"mode": "On"}  # another picture's
    assert large_ui.asked((OFF, 0, 0, ROWS), p.async_lowvram_large)[0] == LargePictures(ON, 768, None, SETTINGS.regions)
