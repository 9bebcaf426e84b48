"""What a safetensors file holds, from its header alone: names, types, shapes; never a byte of tensor data.

Problem: `plan` looks at files of gigabytes that may be cut short, made by anything, or hostile. The format (documentation of
huggingface/safetensors, "Format"): 8 bytes N, little-endian; N bytes of JSON, name -> {dtype, shape, data_offsets: [begin,
end)} counted from the header's end, and optionally `__metadata__`; then the data, which the tensors cover without holes.
Whatever breaks these rules is an error with one line; sizes are bounded before anything is read. Needs no package, not even
safetensors, so that it runs with any Python.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_HEADER_BYTES = 100_000_000
"""As in safetensors itself."""

MOST_DIMENSIONS = 32

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
}  # fmt: skip
"""Bits of one element."""

FLOATING = frozenset(name for name in BITS if name.startswith(("F", "BF")))


class HeaderError(ValueError):
    """The file is not a safetensors file that could be loaded; one line that says what is wrong."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor. `nbytes`: as stored. `offset`: of its first byte, from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int = field(default=0, compare=False)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """name -> tensor, in the order of the data. Raises `HeaderError`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            _check_start(path, start, size)
            length = int.from_bytes(start, "little")
            if length > MOST_HEADER_BYTES:
                raise HeaderError(f"{path} is not a safetensors file: its header would be {length} bytes, of at most {MOST_HEADER_BYTES}")
            if length > size - 8:
                raise HeaderError(f"{path} is cut short: its header is {length} bytes long, and only {size - 8} follow")
            text = file.read(length)
    except OSError as error:
        raise HeaderError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) != length:
        raise HeaderError(f"{path} changed while it was read")
    return _tensors(path, _parse(path, text), 8 + length, size - 8 - length)


def _check_start(path: Path, start: bytes, size: int) -> None:
    if start.startswith(b"PK\x03\x04"):
        raise HeaderError(f"{path} is a zip archive, as .ckpt files are, and not a safetensors file; nothing in it was read")
    if len(start) < 8:
        raise HeaderError(f"{path} is not a safetensors file: it is {size} bytes long")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise HeaderError(f"{path} is not a safetensors file: its header is nested too deep") from None
    except ValueError as error:  # not JSON, not UTF-8, a number too long, a name twice
        raise HeaderError(f"{path} is not a safetensors file: its header is not valid ({shown(str(error), 80)})") from None
    if not isinstance(header, dict):
        raise HeaderError(f"{path} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _tensors(path: Path, header: dict[str, Any], data_start: int, data_bytes: int) -> dict[str, TensorInfo]:
    found: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in header.items():
        try:
            begin, end, tensor = _tensor(entry, data_start)
        except ValueError as error:
            raise HeaderError(f"{path}: tensor {shown(name)} {error}") from None
        if end > data_bytes:
            raise HeaderError(f"{path} is cut short: tensor {shown(name)} ends at byte {shown(end)} of the data, of {data_bytes}")
        found.append((begin, end, name, tensor))
    found.sort(key=lambda each: each[:2])
    at, before = 0, ""
    for begin, end, name, _ in found:
        if begin < at:
            raise HeaderError(f"{path}: tensors {shown(before)} and {shown(name)} overlap")
        if begin > at:
            raise HeaderError(f"{path}: bytes {at} to {begin} of the data belong to no tensor")
        at, before = end, name
    if at != data_bytes:
        raise HeaderError(f"{path}: {data_bytes - at} bytes after the last tensor belong to none")
    return {name: tensor for _, _, name, tensor in found}


def _tensor(entry: Any, data_start: int) -> tuple[int, int, TensorInfo]:
    """(begin, end, tensor), the first two within the data. Raises ValueError with the end of a sentence."""
    if not isinstance(entry, dict):
        raise ValueError("is not described by an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"has an unknown dtype, {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_size, shape)):
        raise ValueError(f"has no usable shape: {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise ValueError(f"has no usable data_offsets: {shown(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise ValueError(f"of shape {shown(shape)} and dtype {dtype} does not take the {end - begin} bytes of its data_offsets")
    return begin, end, TensorInfo(dtype, tuple(shape), end - begin, data_start + begin)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def shown(value: Any, most: int = 60) -> str:
    """Something from a file nobody has checked, for a message: on one line, without control characters, not too long."""
    if isinstance(value, (list, dict)):
        simple = len(value) <= 8 and not any(isinstance(each, (list, dict)) for each in value)
        value = value if simple and isinstance(value, list) else f"a {type(value).__name__} of {len(value)}"
    text = value if isinstance(value, str) else str(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
