"""The accordion "Large pictures" in txt2img and img2img: its controls, what they say, and how they come back from a picture.

Problem: what is asked for comes four ways - the form, the API (`alwayson_scripts`, the same values in the same order), the X/Y/Z plot,
a picture's own text - and must mean the same. All four go through `asked` to `large.settings.read`; what a picture tells is written by
`infotext_of` and read back by `infotext_fields`.

Invariant: off writes nothing into a picture's text, and asks for nothing.

gradio is imported when controls are made. Called while the UI is built, and on the thread that starts a job.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib_async_lowvram.large.regions import Region
from lib_async_lowvram.large.settings import MODES, MOST_TILE, OFF, STEP, LargePictures, read
from lib_async_lowvram.webui import plot
from lib_async_lowvram.webui.plot import Axis

TITLE = "Large pictures"
COLUMNS = ("x", "y", "width", "height", "prompt", "negative", "weight")
KEYS = {"mode": "Large pictures", "tile": "Large tile", "overlap": "Large overlap", "regions": "Large regions"}
"""Setting -> its name in a picture's text, in the order of the controls and of the API's arguments."""

OVERRIDES = "async_lowvram_large"
"""Attribute of the host's processing object: settings that count instead of the controls' (X/Y/Z plot)."""


# -- controls ----------------------------------------------------------------------------------------------------------------
def controls(elem_id: Callable[[str], str]) -> list[Any]:
    """Mode, tile, overlap, regions, in an accordion that is closed. `elem_id`: the script's own."""
    import gradio as gr

    with gr.Accordion(TITLE, open=False, elem_id=elem_id("large")):
        mode = gr.Radio(
            list(MODES),
            value=OFF,
            label="Tiles",
            elem_id=elem_id("large_mode"),
            info="Automatic: where a picture is larger than a tile, or memory is short",
        )
        with gr.Row():
            tile = gr.Slider(0, MOST_TILE, value=0, step=STEP, label="Tile (pixels)", info="0: automatic", elem_id=elem_id("large_tile"))
            overlap = gr.Slider(
                0, MOST_TILE // 2, value=0, step=8, label="Overlap (pixels)", info="0: automatic", elem_id=elem_id("large_overlap")
            )
        regions = gr.Dataframe(
            headers=list(COLUMNS),
            datatype=["number"] * 4 + ["str"] * 2 + ["number"],
            row_count=(1, "dynamic"),
            col_count=(len(COLUMNS), "fixed"),
            type="array",
            value=[[None] * len(COLUMNS)],
            label="Regions with prompts of their own; x, y, width, height: shares of the picture, 0 to 1; no negative: the picture's",
            elem_id=elem_id("large_regions"),
        )
    return [mode, tile, overlap, regions]


def infotext_fields(made: Sequence[Any]) -> list[tuple[Any, Callable[[Mapping[str, Any]], Any]]]:
    """For the host: each control, and what it shows when a picture's text is pasted. Without ours in it: off."""
    defaults = (OFF, 0, 0, None)

    def field(name: str, default: Any) -> Callable[[Mapping[str, Any]], Any]:
        def restored(params: Mapping[str, Any]) -> Any:
            found = params.get(KEYS[name], default)
            # As the table itself holds its value: the host turns what it is given into that type.
            return {"headers": list(COLUMNS), "data": rows_of(found)} if name == "regions" else found

        return restored

    return [(control, field(name, default)) for control, name, default in zip(made, KEYS, defaults, strict=True)]


def accordion(elem_id: Callable[[str], str]) -> tuple[list[Any], list[tuple[Any, Callable[[Mapping[str, Any]], Any]]]]:
    """The controls, and their `infotext_fields`."""
    made = controls(elem_id)
    return made, infotext_fields(made)


def rows_of(regions: Any) -> list[list[Any]]:
    """The table's rows for regions as `asked` takes them; one empty row where there are none, or none can be read."""
    try:
        found = read(MODES[-1], regions=_mappings(regions))[0].regions
    except ValueError:
        found = ()
    rows = [[region.x, region.y, region.width, region.height, region.prompt, region.negative or "", region.weight] for region in found]
    return rows or [[None] * len(COLUMNS)]


# -- what is asked for -------------------------------------------------------------------------------------------------------
def asked(args: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> tuple[LargePictures, tuple[str, ...]]:
    """Settings, and a line for each value that was replaced. `args`: of the controls, or of the API, which may be fewer, or a single
    mapping of the settings' names. `overrides`: settings by name. ValueError where they cannot be read."""
    first = args[0] if args else None
    given = dict(first) if isinstance(first, Mapping) else dict(zip(KEYS, args, strict=False))
    unknown = [name for name in given if name not in KEYS]
    if unknown:
        raise ValueError(f"large pictures: there is no setting {unknown[0]!r}, only {', '.join(KEYS)}")
    given.update(overrides or {})
    if str(given.get("mode") or OFF).lower() != OFF.lower():
        given["regions"] = _mappings(given.get("regions"))
    return read(**given)


def _mappings(regions: Any) -> Any:
    """Rows of the table, as a form or its default sends them, become mappings; empty rows are left out. Anything else stays."""
    if isinstance(regions, str):
        try:
            regions = json.loads(regions) if regions.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"regions are not JSON: {error}") from None
    if isinstance(regions, Mapping) and "data" in regions:
        regions = regions["data"]  # the table's value before anybody has touched it
    if not isinstance(regions, Sequence) or isinstance(regions, (str, bytes)):
        return regions
    return [_mapping(number, row) for number, row in enumerate(regions, start=1) if not _is_empty(row)]


def _is_empty(row: Any) -> bool:
    return isinstance(row, Sequence) and not isinstance(row, (str, bytes)) and all(value is None or value == "" for value in row)


def _mapping(number: int, row: Any) -> Any:
    if isinstance(row, (Mapping, Region)) or not isinstance(row, Sequence) or isinstance(row, (str, bytes)):
        return row
    if len(row) != len(COLUMNS):
        raise ValueError(f"region {number} has {len(row)} columns of {len(COLUMNS)}: {', '.join(COLUMNS)}")
    found = dict(zip(COLUMNS, row, strict=True))
    for name in ("x", "y", "width", "height", "weight"):
        found[name] = _number(found[name])
    if found["weight"] is None:
        del found["weight"]
    found["negative"] = found["negative"] or None
    return found


def _number(value: Any) -> Any:
    """A table may send numbers as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value or None
    return value


# -- a picture's own text ----------------------------------------------------------------------------------------------------
def infotext_of(settings: LargePictures) -> dict[str, Any]:
    """What is written into a picture: nothing when off, and of the sizes only those that were set."""
    if settings.off:
        return {}
    found: dict[str, Any] = {KEYS["mode"]: settings.mode}
    for name in ("tile", "overlap"):
        value = getattr(settings, name)
        if value is not None:
            found[KEYS[name]] = value
    if settings.regions:
        found[KEYS["regions"]] = json.dumps([region.as_json() for region in settings.regions], ensure_ascii=False)
    return found


# -- X/Y/Z plot --------------------------------------------------------------------------------------------------------------
def add_axes(loaded: Sequence[Any]) -> int:
    """See `plot.add_axes`."""
    kinds = {"mode": (str, MODES), "tile": (int, None), "overlap": (int, None)}
    return plot.add_axes(loaded, TITLE, [Axis(name, kind, choices, _apply(name)) for name, (kind, choices) in kinds.items()])


def _apply(name: str) -> plot.Apply:
    def apply(p: Any, x: Any, xs: Any) -> None:
        # A new mapping: the plot copies `p` shallowly for each of its pictures.
        setattr(p, OVERRIDES, {**(getattr(p, OVERRIDES, None) or {}), name: x})

    return apply
