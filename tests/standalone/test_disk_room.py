"""Activations on disk: what was written is what is read, nothing stays behind, a full disk says so."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest
import torch

from lib_async_lowvram.large.disk_room import DiskRoom, OutOfDiskSpace
from lib_async_lowvram.large.space import OutOfHostMemory, Space, StoredOnDisk


def test_what_is_written_is_read(tmp_path: Path) -> None:
    room = DiskRoom(tmp_path)
    file = room.file()
    values = torch.arange(1000, dtype=torch.float32)
    file.write(0, values[:600])
    file.write(2400, values[600:])
    into = torch.empty(300)
    file.read(4 * 500, into)
    assert torch.equal(into, values[500:800])
    assert room.written_bytes == 4000 and room.read_bytes == 1200 and room.free_bytes() > 0
    with pytest.raises(OSError, match="shorter than what was written"):
        file.read(3000, torch.empty(300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation(tmp_path: Path, dtype: torch.dtype) -> None:
    space = Space(torch.device("cpu"), 0, 1 << 20, 1 << 20, disk=DiskRoom(tmp_path))
    x = torch.randn(2, 3, 10, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    stored = space.store(x.shape, dtype)
    assert isinstance(stored, StoredOnDisk) and space.host_now == x.numel() * x.element_size()
    stored.write(0, x[:, :, :4])
    stored.write(4, x[:, :, 4:])
    assert torch.equal(stored.rows(3, 8), x[:, :, 3:8]) and torch.equal(stored.whole(), x)
    assert space.spilled == x.numel() * x.element_size()
    mean = stored.moments.groups(1).mean
    assert torch.allclose(mean, x.double().mean((1, 2, 3)).view(2, 1), atol=1e-2)
    del stored
    gc.collect()
    assert space.host_now == 0 and list(tmp_path.iterdir()) == []


def test_the_limit_holds(tmp_path: Path) -> None:
    space = Space(torch.device("cpu"), 0, 1 << 20, 1000, disk=DiskRoom(tmp_path))
    with pytest.raises(OutOfHostMemory):
        space.store((1, 1, 100, 100), torch.float32)
    assert space.host_now == 0


def test_a_full_disk(tmp_path: Path) -> None:
    file = DiskRoom(tmp_path).file()

    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    file._file = Full()
    with pytest.raises(OutOfDiskSpace, match="No space left on device: activations"):
        file.write(0, torch.zeros(4))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        DiskRoom(tmp_path / "none").free_bytes()
