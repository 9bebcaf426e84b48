"""A checkpoint whose tensors stay in the file: names, and tensors over a mapping that nobody reads before a mover does.

Problem: converters rename tensors and cut views of them; both work on tensors over the mapping without touching a byte. What they copy
instead would be read from the file and stay in memory, so who takes tensors from here asks `in_file` afterwards.

Called by `networks`. The file must not change while it is used: `WeightFile` notices.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lib_async_lowvram.device.weight_file import WeightFile
from lib_async_lowvram.safetensors_header import HeaderError, TensorInfo, read_header
from lib_async_lowvram.standalone.errors import CannotMake

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Weights of other kinds are for other loaders: eight bits need scales that single files do not hold."""


class Checkpoint:
    """An open checkpoint.

    Attributes:
        tensors: name -> what the header says. file: to be told to the mover (`mover.host.files`).
    """

    def __init__(self, path: Path) -> None:
        """`CannotMake` where it cannot be read, or is not a safetensors file."""
        try:
            self.tensors: dict[str, TensorInfo] = read_header(path)
            self.file = WeightFile(path)
        except (HeaderError, ValueError) as error:
            raise CannotMake(str(error)) from error
        except OSError as error:
            raise CannotMake(f"cannot read {path}: {error.strerror or error}") from error

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """All weights whose names begin so, under their full names. `CannotMake` for types that are not computed with."""
        return {name: self._tensor(name, info) for name, info in self.tensors.items() if name.startswith(prefix) and info.dtype != "I64"}

    def _tensor(self, name: str, info: TensorInfo) -> torch.Tensor:
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise CannotMake(f"{name} is stored as {info.dtype}; only {', '.join(DTYPES)} can be computed with")
        try:
            return self.file.tensor(info.offset, dtype, info.shape)
        except ValueError as error:  # a header of odd length puts them where no float may lie
            raise CannotMake(f"{error}: save the file anew with a current version of safetensors") from error

    def in_file(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor still lies in the file."""
        return self.file.offset_of(tensor) is not None
