"""Headers that are cut short, absurd or hostile: one line and exit code 2, never a traceback, never tensor data read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.safetensors_header import MOST_HEADER_BYTES, HeaderError, read_header
from tests.commands import headers


def text(**entries) -> bytes:
    return json.dumps(entries).encode()


def entry(dtype="F16", shape=(2,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_what_safetensors_writes(tmp_path):
    tensors = {
        "a.weight": torch.arange(15, dtype=torch.float16).view(3, 5),
        "b": torch.zeros((), dtype=torch.int64),
        "c": torch.zeros(0, 4),
        "d": torch.zeros(7, dtype=torch.bfloat16),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, str(path), metadata={"what": "ever"})
    found = read_header(path)
    assert {name: (tensor.shape, tensor.nbytes) for name, tensor in found.items()} == {
        name: (tuple(tensor.shape), tensor.numel() * tensor.element_size()) for name, tensor in tensors.items()
    }
    content = path.read_bytes()
    for name, tensor in found.items():
        stored = tensors[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.nbytes else b""
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == stored, name


BAD = {
    "not json": (b"{broken", 0, "its header is not valid"),
    "not utf-8": (b'{"\xff": 1}', 0, "its header is not valid"),
    "a list": (b"[]", 0, "not a JSON object"),
    "nothing": (b"", 0, "its header is not valid"),
    "nested": (b"[" * 200_000, 0, "nested too deep"),
    "a number too long": (b'{"a": ' + b"1" * 10_000 + b"}", 0, "error: "),
    "a name twice": (b'{"a": 1, "a": 2}', 0, "a name occurs twice"),
    "an entry that is a number": (text(a=5), 0, "tensor a is not described by an object"),
    "no dtype": (text(a={"shape": [1], "data_offsets": [0, 1]}), 1, "unknown dtype, None"),
    "unknown dtype": (text(a=entry("Q7")), 4, "unknown dtype, Q7"),
    "a dtype that is a list": (text(a=entry([1])), 4, "unknown dtype"),
    "negative shape": (text(a=entry(shape=[-2])), 4, "no usable shape"),
    "shape of booleans": (text(a=entry(shape=[True, True])), 4, "no usable shape"),
    "shape of lists": (text(a=entry(shape=[[[]]])), 4, "no usable shape: a list of 1"),
    "too many dimensions": (text(a=entry(shape=[1] * 500)), 4, "no usable shape: a list of 500"),
    "shape that is huge": (text(a=entry(shape=[1 << 62] * 30)), 4, "does not take the 4 bytes"),
    "three offsets": (text(a=entry(offsets=[0, 1, 2])), 4, "no usable data_offsets"),
    "offsets backwards": (text(a=entry(offsets=[4, 0])), 4, "no usable data_offsets"),
    "offsets of text": (text(a=entry(offsets=["0", "4"])), 4, "no usable data_offsets"),
    "offsets not of the shape": (text(a=entry(offsets=[0, 5])), 5, "does not take the 5 bytes"),
    "offsets out of the file": (text(a=entry()), 3, "is cut short: tensor a ends at byte 4"),
    "overlap": (text(a=entry(), b=entry(offsets=[2, 6])), 6, "tensors a and b overlap"),
    "hole": (text(a=entry(), b=entry(offsets=[8, 12])), 12, "bytes 4 to 8 of the data belong to no tensor"),
    "rest": (text(a=entry()), 9, "5 bytes after the last tensor"),
    "control characters": (text(**{"a\n\x1b[31m": 5}), 0, "tensor a\\n\\x1b[31m is"),
    "half a character": (b'{"\\ud800": 5}', 0, "tensor \\ud800 is"),
    "a long name": (text(**{"n" * 5000: 5}), 0, "nnn... is"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_headers(tmp_path, what, capsys):
    header, data, says = BAD[what]
    path = headers.write_raw(tmp_path / "x.safetensors", header, data)
    assert main(["plan", "--checkpoint", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1 and len(error) < 500


@pytest.mark.parametrize(
    ("length", "says"), [(1 << 63, "its header would be"), (MOST_HEADER_BYTES + 1, "its header would be"), (50, "is cut short")]
)
def test_a_header_longer_than_the_file(tmp_path, length, says):
    with pytest.raises(HeaderError, match=says):
        read_header(headers.write_raw(tmp_path / "x", b"{}", 0, length))


@pytest.mark.parametrize(("content", "says"), [(b"", "0 bytes long"), (b"\x01\x02", "2 bytes long"), (b"PK\x03\x04" + b"x" * 50, "zip")])
def test_no_header_at_all(tmp_path, content, says):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=says):
        read_header(path)


def test_files_that_cannot_be_read(tmp_path, capsys):
    for path in (tmp_path / "missing", tmp_path):
        assert main(["plan", "--checkpoint", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: cannot read {path}: ")


WHOLE = json.dumps(headers.header({"a": ("F16", (2, 3)), "b.c": ("F32", (4,))})[0]).encode()


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.integers(-40, 3))
def test_any_damage_is_an_error_or_harmless(tmp_path_factory, at, byte, more):
    """One byte changed, the file cut or grown: either read as something consistent, or an error of ours."""
    path: Path = tmp_path_factory.getbasetemp() / "damaged"
    headers.write_raw(path, WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :], 28)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + more)
    try:
        found = read_header(path)
    except HeaderError as error:
        assert "\n" not in str(error)
    else:
        assert sum(tensor.nbytes for tensor in found.values()) == 28 and more == 0
