"""What is asked for: one picture, as a frozen value; and how sizes and amounts are written on a command line.

Standard library only: imported with the command line. Pixels, bytes, steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CELL = 8
"""Pixels to a latent cell."""

STEP = 64
"""Sizes are multiples of it: the UNet halves the latent three times."""

LEAST, MOST = 64, 16384
UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


@dataclass(frozen=True)
class Request:
    """One picture.

    Attributes:
        checkpoint: a safetensors file in the naming of the LDM code. width, height: pixels.
        memory_bytes: main memory beyond what the program takes after its imports, or device memory on a GPU.
        cfg: guidance; 1 or less is none, and then the negative prompt counts for nothing. sampler: a name of `samplers.NAMES`.
        image, strength: a picture to start from, and how much of it is made anew, 0 to 1.
        device: "cpu", "cuda", "cuda:1", "simulated". precision: "auto", "float32", "bfloat16", "float16".
        tile: side of a tile in pixels; None: as memory allows. spill: folder for activations that wait; None: that of temporary files.
    """

    checkpoint: Path
    prompt: str
    width: int
    height: int
    steps: int
    memory_bytes: int
    negative_prompt: str = ""
    seed: int = 0
    sampler: str = "Euler"
    cfg: float = 7.5
    image: Path | None = None
    strength: float = 0.75
    device: str = "cpu"
    precision: str = "auto"
    tile: int | None = None
    spill: Path | None = None

    @property
    def cells(self) -> tuple[int, int]:
        """(rows, columns) of the latent."""
        return self.height // CELL, self.width // CELL

    @property
    def conditions(self) -> int:
        """Samples of the UNet for one picture: with guidance, the negative prompt's beside the prompt's."""
        return 2 if self.cfg > 1 else 1


def size(text: str) -> tuple[int, int]:
    """(width, height) of "2048x1536". ValueError, saying what is wrong."""
    found = re.fullmatch(r"(\d{1,6})\s*[xX]\s*(\d{1,6})", text.strip())
    if found is None:
        raise ValueError(f"{text[:40]!r} is no size: write it as 2048x1536, width first")
    width, height = map(int, found.groups())
    for name, value in (("width", width), ("height", height)):
        if value % STEP or not LEAST <= value <= MOST:
            raise ValueError(f"a {name} of {value}: must be a multiple of {STEP}, from {LEAST} to {MOST}")
    return width, height


def amount(text: str) -> int:
    """Bytes of "800MB", "1.5GB", "900000000"; units of 1024. ValueError, saying what is wrong."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?B?)", text.strip().upper())
    if found is None:
        raise ValueError(f"{text[:40]!r} is no amount of memory: write it as 800MB or 1.5GB")
    number, unit = found.groups()
    return int(float(number) * UNITS[unit if unit in UNITS else unit + "B"])
