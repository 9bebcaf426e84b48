"""A file of weights as tensors, read in ranges; what happens when it changes; and units whose masters are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.weight_file import FileMaster, WeightFile, WeightsChanged, master_in_file
from lib_async_lowvram.device.weights import Change, Unit

NBYTES = 40_000


@pytest.fixture
def content() -> bytes:
    return bytes(torch.randint(0, 256, (NBYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).tolist())


@pytest.fixture
def file(tmp_path: Path, content: bytes):
    path = tmp_path / "weights.bin"
    path.write_bytes(content)
    found = WeightFile(path)
    yield found
    found.close()


def test_a_tensor_over_the_file(file: WeightFile, content: bytes) -> None:
    found = file.tensor(64, torch.float16, (10, 20))
    assert found.shape == (10, 20) and found.dtype is torch.float16 and file.offset_of(found) == 64
    assert bytes(found.view(torch.uint8).flatten().tolist()) == content[64:464]
    assert file.offset_of(found[3]) == 64 + 3 * 40
    assert file.offset_of(torch.zeros(3)) is None


@pytest.mark.parametrize(("offset", "count"), [(-2, 1), (NBYTES, 1), (NBYTES - 2, 2), (3, 1)])
def test_what_is_not_there(file: WeightFile, offset: int, count: int) -> None:
    with pytest.raises(ValueError):
        file.tensor(offset, torch.float16, (count,))


def test_writing_to_it_leaves_the_file_alone(file: WeightFile, content: bytes) -> None:
    found = file.tensor(0, torch.uint8, (NBYTES,))
    found[:100] = 7
    assert found[:100].eq(7).all() and file.path.read_bytes() == content
    again = torch.empty(100, dtype=torch.uint8)
    file.read(again, 0)
    assert bytes(again.tolist()) == content[:100]


@pytest.mark.parametrize(("offset", "nbytes"), [(0, NBYTES), (17, 0), (17, 1), (4095, 8193), (NBYTES - 3, 3)])
def test_reading(file: WeightFile, content: bytes, offset: int, nbytes: int) -> None:
    into = torch.zeros(nbytes, dtype=torch.uint8)
    file.read(into, offset)
    assert bytes(into.tolist()) == content[offset : offset + nbytes]
    assert file.read_bytes == nbytes and file.read_seconds > 0


def test_reading_without_a_position_of_its_own(file: WeightFile, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.delattr(os, "preadv", raising=False)
    test_reading(file, content, 4095, 8193)


def test_short_reads_go_on(file: WeightFile, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:1000]], offset))
    test_reading(file, content, 4095, 8193)


@pytest.mark.parametrize("how", ["longer", "shorter", "written"])
def test_a_file_that_changes_is_noticed(file: WeightFile, content: bytes, how: str) -> None:
    if how == "written":
        found = os.stat(file.path)
        os.utime(file.path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    else:
        file.path.open("r+b").truncate(NBYTES + (10 if how == "longer" else -10))
    with pytest.raises(WeightsChanged, match="changed while"):
        file.read(torch.zeros(8, dtype=torch.uint8), 0)


def test_one_that_is_replaced_stays_the_old_one(file: WeightFile, content: bytes) -> None:
    other = file.path.with_name("other")
    other.write_bytes(bytes(NBYTES))
    os.replace(other, file.path)
    test_reading(file, content, 0, 1000)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        WeightFile(tmp_path / "none")
    (tmp_path / "empty").touch()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(ValueError, match="empty"):
        WeightFile(tmp_path / "empty")
    assert not before or len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_it_is_closed_when_nobody_holds_it(file: WeightFile) -> None:
    before = len(os.listdir("/proc/self/fd"))
    other = WeightFile(file.path)
    kept = other.tensor(0, torch.uint8, (10,))
    assert len(os.listdir("/proc/self/fd")) > before
    del other
    assert len(os.listdir("/proc/self/fd")) == before and kept.numel() == 10


def test_the_mapping_outlives_the_reads(file: WeightFile, content: bytes) -> None:
    found = file.tensor(0, torch.uint8, (10,))
    file.close()
    file.close()
    assert bytes(found.tolist()) == content[:10]
    with pytest.raises(OSError):
        file.read(torch.zeros(8, dtype=torch.uint8), 0)


@pytest.mark.parametrize(("start", "nbytes"), [(0, 3072), (0, 100), (500, 700), (1024, 1024), (1500, 1572), (3071, 1)])
def test_a_pack_is_read_from_its_pieces(file: WeightFile, content: bytes, start: int, nbytes: int) -> None:
    pieces = ((0, 5000, 600), (1024, 100, 1024), (2048, 30_000, 1000))
    into = torch.full((nbytes,), 255, dtype=torch.uint8)
    FileMaster(file, pieces, 3072).read(into, start)
    expected = bytearray(b"\xff" * 3072)
    for place, offset, size in pieces:
        expected[place : place + size] = content[offset : offset + size]
    assert bytes(into.tolist()) == bytes(expected[start : start + nbytes])


def test_where_a_pack_lies(file: WeightFile) -> None:
    tensors = file.tensor(0, torch.float16, (8,)), file.tensor(1024, torch.float16, (4, 4))
    first, second = (nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
    assert master_in_file([file], [(first, 512), (second, 0)], 1024).pieces == ((0, 1024, 32), (512, 0, 16))
    assert master_in_file([file], [(first, 0), (torch.zeros(3), 512)], 1024) is None
    assert master_in_file([], [(first, 0)], 512) is None and master_in_file([file], [], 0) is None
    second.add_(1)
    assert master_in_file([file], [(second, 0)], 512) is None


# -- units -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def unit(file: WeightFile):
    """A leaf whose weight and bias are in the file, and its unit."""
    leaf = nn.Module()
    leaf.weight = nn.Parameter(file.tensor(64, torch.int16, (10, 20)), requires_grad=False)
    leaf.bias = nn.Parameter(file.tensor(1000, torch.int16, (10,)), requires_grad=False)
    streams = SimulatedStreams(capacity_bytes=1 << 20, bandwidth=1e12, latency=0.0)
    host = HostMemory(streams)
    host.files.append(file)
    yield leaf, Unit(0, "leaf", [leaf], host), host
    streams.close()


def test_a_unit_in_the_file_takes_no_memory(unit, file: WeightFile) -> None:
    leaf, found, host = unit
    assert found.in_file is not None and found.nbytes == 512 + 512 and host.host_bytes == 0
    assert file.offset_of(leaf.weight) == 64 and found.host_change() is Change.NONE
    assert file.read_bytes == 0


def test_one_that_is_written_to_gets_memory_of_its_own(unit, file: WeightFile, content: bytes) -> None:
    leaf, found, host = unit
    with torch.no_grad():
        leaf.bias.fill_(3)
    assert found.host_change() is Change.VALUES
    expected = leaf.weight.clone()
    found.accept_versions()
    assert found.in_file is None and host.host_bytes == 1024 and found.host_change() is Change.NONE
    assert torch.equal(leaf.weight, expected) and leaf.bias.eq(3).all() and file.offset_of(leaf.weight) is None
    assert torch.equal(found.bytes_on_host()[:400].view(torch.int16).view(10, 20), expected)
    assert file.path.read_bytes() == content


def test_one_that_was_looked_at_stays(unit) -> None:
    leaf, found, host = unit
    found.accept_versions()
    assert found.in_file is not None
    found.dirty = True
    found.accept_versions()
    assert found.in_file is None and not found.dirty


def test_another_tensor_put_there(unit) -> None:
    leaf, found, host = unit
    leaf.weight = nn.Parameter(torch.ones(10, 20, dtype=torch.int16), requires_grad=False)
    assert found.host_change() is Change.LAYOUT
    found.pack()
    assert found.in_file is None and leaf.weight.eq(1).all()


def test_a_file_that_changed_is_no_source_for_memory_either(unit, file: WeightFile) -> None:
    """A copy from it failed, say, and is to be made again: not from what the file holds now. What was written since is whole."""
    leaf, found, host = unit
    status = os.stat(file.path)
    os.utime(file.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    found.dirty = True
    for _ in range(2):
        with pytest.raises(WeightsChanged, match="load another checkpoint"):
            found.accept_versions()
    assert found.in_file is not None and host.host_bytes == 0
    with torch.no_grad():
        leaf.weight.fill_(1)
        leaf.bias.fill_(2)
    found.accept_versions()
    assert found.in_file is None and leaf.weight.eq(1).all() and leaf.bias.eq(2).all()
