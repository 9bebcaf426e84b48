"""The settings section "Async LowVRAM": what the user sees, and reading it back from values nobody has checked.

Problem: values posted to the options API are not validated (a slider may hold "abc"), `override_settings` skips every
change callback, and the first model loads before our options are registered. So options are read where they are used, at
the start of each pass, with their default where they are missing; what is unusable is clamped and told once.
Called at UI build (`register`) and at pass starts on the thread that computes (`SettingsReader`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from lib_async_lowvram.config import MIB, OffloadConfig
from lib_async_lowvram.log import logger

SECTION = ("async_lowvram", "Async LowVRAM")
CATEGORY = "sd"
ENABLED = "async_lowvram_enabled"
PREFIX = "async_lowvram_"
SIZES = ("lookahead_mb", "budget_mb", "pinned_mb")
PREVIEWS = "async_lowvram_previews"
ALWAYS_WRITE_BACK = "async_lowvram_always_write_back"
ON_DISK = "async_lowvram_on_disk"
CHECK_PLACEMENT_VARIABLE = "ASYNC_LOWVRAM_CHECK_PLACEMENT"

FULL_PREVIEW_BYTES = 32 * MIB
"""Of the budget: the ring and small leaves of a VAE that decodes previews. Two of its largest leaf are 9.4 MB in half precision."""

_REMEMBERED_MESSAGES = 64

# key -> (label, component, component arguments, default, what the user should know), the ones that most users may want first. The host
# takes the last for HTML and puts it in parentheses: no <, > and &. Where it is too long for one line beside a checkbox, the host squeezes
# the label. Labels and these texts are keys of localizations/*.json.
_OPTIONS: dict[str, tuple[str, str, dict[str, Any], Any, str]] = {
    ENABLED: (
        "Move weights while the GPU computes",
        "Checkbox",
        {},
        True,
        "the same pictures as --lowvram and --medvram make, sooner; off: the WebUI's own moves; applies to the next job, no restart",
    ),
    PREFIX + "budget_mb": (
        "VRAM budget for weights (MB)",
        "Slider",
        {"minimum": 0, "maximum": 24576, "step": 64},
        0,
        "0 = automatic; more is faster, less leaves room for larger pictures: lower it if you run out of memory; applies to the next step",
    ),
    PREFIX + "lookahead_mb": (
        "Lookahead buffer (MB)",
        "Slider",
        {"minimum": 0, "maximum": 4096, "step": 16},
        0,
        "0 = automatic; how much may be on its way to the GPU ahead of its use; more smooths slow transfers, but is taken from the budget "
        "above; applies to the next step",
    ),
    PREVIEWS: (
        "Decode live previews on their own stream",
        "Checkbox",
        {},
        True,
        "previews of the whole batch that do not hold up the sampling; off: the WebUI's own; Full takes 32 MB of the budget; applies to "
        "the next job",
    ),
    PREFIX + "pinned_mb": (
        "Pinned memory limit (MB)",
        "Slider",
        {"minimum": 0, "maximum": 65536, "step": 256},
        0,
        "main memory locked for fast transfers; 0 = automatic: 60% of RAM, 40% on Windows, 512 MB under WSL; less leaves more to other "
        "programs, but what is beyond it travels more slowly",
    ),
    ON_DISK: (
        "Keep weights on disk",
        "Checkbox",
        {},
        False,
        "less RAM, but slower unless the disk is fast: unchanged weights are read from the .safetensors file at every step; do not "
        "overwrite it; applies to the next job",
    ),
    ALWAYS_WRITE_BACK: (
        "Always write weights back",
        "Checkbox",
        {},
        False,
        "only if pictures under some extension differ from the WebUI's own; much slower: all weights travel both ways at every step; not "
        "needed for LoRA",
    ),
}


def register() -> None:
    """Add our options; from the host's `on_ui_settings` callback."""
    shared = importlib.import_module("modules.shared")
    gradio = importlib.import_module("gradio")
    for key, (label, component, arguments, default, info) in _OPTIONS.items():
        option = shared.OptionInfo(default, label, getattr(gradio, component), dict(arguments), section=SECTION).info(info)
        # As an attribute: hosts that do not know categories ignore it, and a keyword would be an error there.
        option.category_id = CATEGORY
        shared.opts.add_option(key, option)


def host_values() -> Mapping[str, Any]:
    """All option values of the host, ours perhaps not among them yet."""
    return importlib.import_module("modules.shared").opts.data


class SettingsReader:
    """Reads our options from unchecked values. `values`: returns the host's option values."""

    def __init__(self, values: Callable[[], Mapping[str, Any]] = host_values, environment: Mapping[str, str] = os.environ) -> None:
        self._values = values
        self._check_placement = environment.get(CHECK_PLACEMENT_VARIABLE, "") == "1"
        self._told: dict[str, None] = {}
        self._raw: tuple[Any, ...] | None = None
        self._config = OffloadConfig()

    def enabled(self) -> bool:
        """Whether the user wants the mover."""
        return self._yes(ENABLED)

    def _yes(self, key: str) -> bool:
        """A checkbox. Anything that is neither yes nor no means the default."""
        default = _OPTIONS[key][3]
        raw = self._values().get(key, default)
        if isinstance(raw, (bool, int, float)) and raw in (0, 1):
            return bool(raw)
        self._tell(f"setting {key}: {str(raw)[:40]!r} is neither yes nor no, taken as {'yes' if default else 'no'}")
        return default

    def previews(self) -> bool:
        """Whether live previews are to be decoded on their own stream."""
        return self._yes(PREVIEWS)

    def on_disk(self) -> bool:
        """Whether weights are to stay in their checkpoint. Not together with "Always write weights back": that is for changes that leave
        no trace, and what is read from the file instead would lose them."""
        wanted = self._yes(ON_DISK)
        if wanted and self._yes(ALWAYS_WRITE_BACK):
            self._tell("weights stay in main memory: \"Always write weights back\" is on; switch it off to keep them on disk")
            return False
        return wanted

    def full_previews(self, values: Mapping[str, Any]) -> bool:
        """Whether the VAE itself decodes previews there: the host's own options say so."""
        return (
            values.get("show_progress_type") == "Full"
            and bool(values.get("live_preview_allow_lowvram_full"))
            and bool(values.get("live_previews_enable", True))
            and self._yes(PREVIEWS)
        )

    def config(self) -> OffloadConfig:
        """What the user wants, sizes clamped. Cheap when nothing has changed: four look-ups and a comparison."""
        values = self._values()
        full = self.full_previews(values)
        raw = (*(values.get(PREFIX + key, 0) for key in SIZES), values.get(ALWAYS_WRITE_BACK, False), full)
        if self._raw is None or not _same(raw, self._raw):
            self._raw = raw
            fixed = {
                "check_placement": self._check_placement,
                "always_write_back": self._yes(ALWAYS_WRITE_BACK),
                "preview_bytes": FULL_PREVIEW_BYTES if full else 0,
            }
            self._config, messages = OffloadConfig.parse(dict(zip(SIZES, raw, strict=False)), **fixed)
            for message in messages:
                self._tell(f"setting {PREFIX}{message}")
        return self._config

    def _tell(self, message: str) -> None:
        """Log once per distinct message; forgets the oldest so that a flood of odd values cannot grow us."""
        if message in self._told:
            return
        if len(self._told) >= _REMEMBERED_MESSAGES:
            self._told.pop(next(iter(self._told)))
        self._told[message] = None
        logger.warning(message)


def _same(new: tuple[Any, ...], old: tuple[Any, ...]) -> bool:
    """Equal in value and type: True == 1, yet they are not the same setting."""
    return new == old and [type(value) for value in new] == [type(value) for value in old]
