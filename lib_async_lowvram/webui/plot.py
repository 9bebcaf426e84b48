"""Axes for the host's X/Y/Z plot.

Problem: the plot is a script that the host loads as a module of its own, perhaps several times (txt2img, img2img), perhaps not at all; its
options are a list in that module. Called by the script before the UI is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lib_async_lowvram.webui.settings import ENABLED, PREFIX

PLOT = "xyz_grid.py"

TITLE = "Async LowVRAM"

Apply = Callable[[Any, Any, Any], None]
"""(the picture to be made, the value, all values of the axis)"""


@dataclass(frozen=True)
class Axis:
    """`kind`: what the plot makes of a typed value. `choices`: offered, or None."""

    name: str
    kind: Callable[[Any], Any]
    choices: tuple[str, ...] | None
    apply: Apply


def _yes(value: Any) -> bool:
    return value if isinstance(value, bool) else str(value).strip().lower() in ("true", "yes", "on", "1")


def _override(key: str, convert: Callable[[Any], Any]) -> Apply:
    def apply(p: Any, value: Any, values: Any) -> None:
        # A new mapping: the plot copies `p` shallowly for each of its pictures.
        p.override_settings = {**(p.override_settings or {}), key: convert(value)}

    return apply


AXES = (
    Axis("enabled", str, ("True", "False"), _override(ENABLED, _yes)),
    Axis("lookahead (MB)", int, None, _override(PREFIX + "lookahead_mb", int)),
    Axis("budget (MB)", int, None, _override(PREFIX + "budget_mb", int)),
)
"""Of the mover. Values that cannot be used are clamped where options are read, and told."""


def add_axes(loaded: Sequence[Any], title: str = TITLE, axes: Sequence[Axis] = AXES) -> int:
    """`axes`, for the X/Y/Z plot among the host's `loaded` scripts (`scripts.scripts_data`), unless it has them; to how many modules
    they were added."""
    added = 0
    for plot in [data.module for data in loaded if str(data.path).endswith(PLOT)]:
        if any(option.label.startswith(f"[{title}]") for option in plot.axis_options):
            continue
        for axis in axes:
            more = {} if axis.choices is None else {"choices": lambda choices=axis.choices: list(choices)}
            plot.axis_options.append(plot.AxisOption(f"[{title}] {axis.name}", axis.kind, axis.apply, **more))
        added += 1
    return added
