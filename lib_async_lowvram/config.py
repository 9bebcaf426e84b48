"""What a user can choose, as one frozen value; reading it from untrusted settings, with every correction told.

The WebUI does not validate option values (a slider may hold "abc"), so `OffloadConfig.parse` takes anything, never raises,
and returns beside the config one message for each value it did not take as it was. Layer 0: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20

# The keys `parse` reads: (key, field, largest MB). The largest are those of the sliders in Settings.
_MEGABYTES = (
    ("lookahead_mb", "lookahead_bytes", 4096),
    ("budget_mb", "budget_bytes", 24576),
    ("pinned_mb", "pinned_limit_bytes", 65536),
)


@dataclass(frozen=True)
class OffloadConfig:
    """All sizes in bytes; 0 means automatic.

    Attributes:
        lookahead_bytes: size of the ring: how much may be on its way to the device ahead of its use. Raised to the least
            that works (two of the largest streamed unit) and lowered to what the budget leaves.
        budget_bytes: weight bytes allowed on the device in streamed passes (I2). Automatic: free memory, less the
            activation peak seen, less `reserve_bytes`.
        pinned_limit_bytes: page-locked host memory. Automatic: 40% of RAM on Windows, 512 MB under WSL, 60% of RAM elsewhere.
        small_leaf_bytes: units smaller than this stay resident whenever the budget allows: copies of them are all latency.
        reserve_bytes: device memory the automatic budget leaves alone.
        preview_bytes: of the budget, what the preview decoder's weights may take instead of the networks'.
        always_write_back: take every use of a unit for a change: for programs that write weights through `.data`, which leaves
            no trace. Slow: all weights travel both ways, in every pass.
        check_placement: run streamed passes under the placement checker and count its faults (slow; for tests).
    """

    lookahead_bytes: int = 0
    budget_bytes: int = 0
    pinned_limit_bytes: int = 0
    small_leaf_bytes: int = MIB
    reserve_bytes: int = 1024 * MIB
    preview_bytes: int = 0
    always_write_back: bool = False
    check_placement: bool = False

    def __post_init__(self) -> None:
        for name in ("lookahead_bytes", "budget_bytes", "pinned_limit_bytes", "small_leaf_bytes", "reserve_bytes", "preview_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number of bytes, 0 or more, not {value!r}")

    @classmethod
    def parse(cls, values: Mapping[str, Any], **fixed: Any) -> tuple[OffloadConfig, list[str]]:
        """Read `lookahead_mb`, `budget_mb`, `pinned_mb` (megabytes of 2**20 bytes; 0 or absent = automatic).

        Returns the config and one message per value that was not usable as given: what it held, what is used instead, and
        why. `fixed` is passed on to the config unread.
        """
        fields: dict[str, int] = {}
        messages: list[str] = []
        for key, field, largest in _MEGABYTES:
            megabytes, message = _megabytes(values.get(key, 0), largest)
            fields[field] = int(megabytes * MIB)
            if message:
                messages.append(f"{key}: {message}")
        return cls(**fields, **fixed), messages


def _megabytes(value: Any, largest: int) -> tuple[float, str]:
    """(usable megabytes, message or "")"""
    if value is None:
        return 0, "empty, taken as 0 (automatic)"
    if isinstance(value, str):
        # A text field may hold a number; anything longer than a number could be is not worth echoing into the log.
        try:
            number = float(value)
        except ValueError:
            return 0, f"{value[:40]!r} is not a number, taken as 0 (automatic)"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return largest, f"too large, lowered to {largest}"
    else:
        return 0, f"a {type(value).__name__} is not a number, taken as 0 (automatic)"
    if math.isnan(number):
        return 0, "not a number, taken as 0 (automatic)"
    if number < 0:
        return 0, f"{number:g} is negative, taken as 0 (automatic)"
    if number > largest:
        return largest, f"{number:g} is more than {largest}, lowered to {largest}"
    return number, ""
