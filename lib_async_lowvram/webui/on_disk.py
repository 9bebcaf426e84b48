"""The setting "Keep weights on disk": a loaded model's weights that are in its checkpoint, byte for byte, need no main memory.

Problem: the host reads a checkpoint into main memory, and there it stays, as masters of units. Owners of little RAM pay for it with swap.
Where a Parameter's bytes are those of a tensor in the checkpoint's safetensors file, the Parameter is pointed at a private mapping of
the file instead (`device.weight_file`): the host and its extensions read and write it as ever, and the mover takes its bytes from the
file. What was converted on the way (half precision, another VAE, a LoRA that is applied now) stays in main memory.

Names differ between model and file where the host has wrapped modules; so a tensor is first looked for under its name, then under the
name without wrappers, then among all of its type and shape. Only equal bytes count.

I6: switched off, weights are ordinary memory again. Called at a job's start, between two passes, on the thread that runs it; looks again
only where the model, its checkpoint or the setting changed.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.device.dense import as_bytes, packable
from lib_async_lowvram.device.weight_file import CHANGED, WeightFile
from lib_async_lowvram.log import logger
from lib_async_lowvram.mover import AsyncModelMover
from lib_async_lowvram.safetensors_header import HeaderError, TensorInfo, read_header

MIB = 1 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Of weights that are looked for."""


@dataclass
class Kept:
    """What was done for one model. in_file, of: bytes. why_not: why nothing is in the file, or "". file: that is mapped, or None."""

    checkpoint: Path | None
    in_file: int = 0
    of: int = 0
    why_not: str = ""
    file: WeightFile | None = None


class WeightsOnDisk:
    """See the module."""

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()

    @property
    def keeps(self) -> bool:
        """Whether any model was looked at, and not given up since."""
        return bool(self._kept)

    def follow(self, models: Iterable[nn.Module], wanted: bool, mover: AsyncModelMover) -> None:
        """Make it so for these models, which are on `mover`."""
        host, touched = mover.host, False
        for model in models:
            known = self._kept.get(model)
            checkpoint = _checkpoint_of(model)
            if not wanted and known is not None:
                mover.drain()
                touched = True
                del self._kept[model]
                if known.file is not None:
                    if known.file.changed:
                        logger.warning("%s", CHANGED)
                    _back_to_memory(model, known.file)
            elif wanted and (known is None or known.checkpoint != checkpoint):
                mover.drain()
                touched = True
                kept = self._kept[model] = _put(model, checkpoint)
                _report(kept)
        files = [kept.file for kept in self._kept.values() if kept.file is not None]
        host.files[:] = [file for file in host.files if file in files] + [file for file in files if file not in host.files]
        if touched:
            mover.take_up()  # so that the memory is given back now, and nothing has to be packed in the middle of a pass

    def status(self, model: nn.Module | None) -> dict[str, Any] | None:
        """Of the model in use: None where nothing was asked for. Bytes."""
        kept = self._kept.get(model) if model is not None else None
        return None if kept is None else {"in_file_bytes": kept.in_file, "of_bytes": kept.of, "why_not": kept.why_not}


def _checkpoint_of(model: nn.Module) -> Path | None:
    name = getattr(getattr(model, "sd_checkpoint_info", None), "filename", None)
    return None if name is None else Path(name)


def _put(model: nn.Module, checkpoint: Path | None) -> Kept:
    kept = Kept(checkpoint)
    if checkpoint is None:
        kept.why_not = "the model does not say which file it was loaded from"
        return kept
    if checkpoint.suffix.lower() != ".safetensors":
        kept.why_not = f"its checkpoint is a {checkpoint.suffix or 'nameless'} file, and not a .safetensors one"
        return kept
    try:
        header, file = read_header(checkpoint), WeightFile(checkpoint)
    except (HeaderError, OSError, ValueError) as error:
        kept.why_not = f"its checkpoint cannot be read ({type(error).__name__})"  # without the path: the status is public
        logger.warning("weights stay in main memory: %s", error)
        return kept
    candidates = _Candidates(header, file)
    for name, parameter in model.named_parameters():
        nbytes = parameter.numel() * parameter.element_size()
        kept.of += nbytes
        offset = candidates.equal_to(name, parameter)
        if offset is not None:
            file.point(parameter, offset)
            kept.in_file += nbytes
    if kept.in_file:
        kept.file = file
    else:
        file.close()
        kept.why_not = "no weight is in its checkpoint as it is in memory: converted to another precision, perhaps"
    return kept


class _Candidates:
    """The file's tensors, by name and by what they look like."""

    def __init__(self, header: dict[str, TensorInfo], file: WeightFile) -> None:
        self._header, self._file = header, file
        self._alike: dict[tuple, list[TensorInfo]] = defaultdict(list)
        for info in header.values():
            if info.dtype in DTYPES:
                self._alike[DTYPES[info.dtype], info.shape].append(info)

    def equal_to(self, name: str, parameter: nn.Parameter) -> int | None:
        """Where the file has a tensor with the same type, shape and bytes."""
        if parameter.device.type != "cpu" or not packable(parameter) or not parameter.is_contiguous():
            return None
        look = (parameter.dtype, tuple(parameter.shape))
        named = [info for each in (name, name.replace(".wrapped.", ".")) if (info := self._header.get(each)) is not None]
        own = as_bytes(parameter.data)
        for info in [*(info for info in named if (DTYPES.get(info.dtype), info.shape) == look), *self._alike.get(look, ())]:
            try:
                found = self._file.tensor(info.offset, *look)
            except ValueError:
                continue  # not aligned: rare, and no reason to copy
            theirs = as_bytes(found)
            if torch.equal(own[:64], theirs[:64]) and torch.equal(own, theirs):
                return info.offset
        return None


def _back_to_memory(model: nn.Module, file: WeightFile) -> None:
    for parameter in model.parameters():
        if packable(parameter) and file.offset_of(parameter) is not None:
            parameter.data = parameter.data.clone()


def _report(kept: Kept) -> None:
    if kept.why_not:
        logger.warning("weights stay in main memory: %s", kept.why_not)
    else:
        logger.info("%d of %d MB of weights stay on disk, where the checkpoint has them", kept.in_file // MIB, kept.of // MIB)
