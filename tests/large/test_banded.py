"""Modules called with a picture in bands compute what they compute with a tensor; what nobody knows is refused, nothing is written to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from lib_async_lowvram.large.banded import Banded, banded
from lib_async_lowvram.large.rows import Untileable
from lib_async_lowvram.large.space import OutOfHostMemory, Space

ROOM = 1 << 30


def space(rows: int | None = 3, device_bytes: int = ROOM, host_bytes: int = ROOM) -> Space:
    return Space(torch.device("cpu"), device_bytes, 1 << 20, host_bytes, rows)


class Circular(nn.Conv2d):
    """As the WebUI makes convolutions for pictures that tile."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.padding_mode = "circular"


OPERATIONS: dict[str, Callable[[], Callable]] = {
    "convolution": lambda: nn.Conv2d(8, 5, 3, padding=1),
    "wide": lambda: nn.Conv2d(8, 5, (5, 3), padding=(2, 1)),
    "dilated": lambda: nn.Conv2d(8, 5, 3, padding=2, dilation=2),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
    "one by one": lambda: nn.Conv2d(8, 5, 1),
    "stride": lambda: nn.Conv2d(8, 5, 3, stride=2, padding=1),
    "circular": lambda: Circular(8, 5, 3, padding=1),
    "norm": lambda: nn.GroupNorm(2, 8),
    "norm, no weights": lambda: nn.GroupNorm(4, 8, affine=False),
    "silu": lambda: functional.silu,
    "swish": lambda: lambda x: x * torch.sigmoid(x),
    "enlarged": lambda: lambda x: functional.interpolate(x, scale_factor=2.0, mode="nearest"),
    "bordered": lambda: lambda x: functional.pad(x, (0, 1, 2, 1), mode="constant", value=0.5),
    "arithmetic": lambda: lambda x: 2 * x - x / 3 + (1 - x) * torch.tanh(x) + x.clamp(-1, 1),
    "channel by channel": lambda: lambda x: x * torch.arange(8.0)[:, None, None] + torch.ones(1, 8, 1, 1),
    "two pictures": lambda: lambda x: functional.pad(x, (1, 0, 0, 1)) + functional.pad(x, (0, 1, 1, 0)),
    "dropout": lambda: nn.Dropout(0.5).eval(),
    "types": lambda: lambda x: (x.double() * 2).float().contiguous(),
}


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("device_bytes", [0, ROOM], ids=["spilled", "on the device"])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_one_operation(name: str, device_bytes: int, rows: int) -> None:
    operation = OPERATIONS[name]()
    x = 2 + torch.randn(2, 8, 13, 10)
    with torch.no_grad():
        expected = operation(x)
        picture = operation(banded(x, space(rows, device_bytes)))
        assert isinstance(picture, Banded) and isinstance(picture, torch.Tensor)
        assert (picture.shape, picture.dtype) == (expected.shape, expected.dtype)
        assert torch.allclose(picture.whole(), expected, rtol=1e-5, atol=1e-5)


def test_in_place_only_this_picture_changes() -> None:
    x = torch.randn(1, 4, 6, 6)
    kept = x.clone()
    picture = banded(x, space())
    before = picture * 2
    picture += before
    picture *= 2
    silu = functional.silu(picture, inplace=True)
    assert silu is picture
    assert torch.equal(before.whole(), 2 * kept)
    assert torch.allclose(picture.whole(), functional.silu((kept + 2 * kept) * 2))
    assert torch.equal(x, kept)


def test_weights_that_change_after_the_call_change_nothing() -> None:
    """The mover takes them away as soon as the module's call is over."""
    norm, x = nn.GroupNorm(2, 4), torch.randn(1, 4, 6, 6)
    weight = nn.Parameter(torch.randn(4, 1, 1))
    with torch.no_grad():
        expected = norm(x) * weight
        picture = norm(banded(x, space())) * weight
        for parameter in (*norm.parameters(), weight):
            parameter.fill_(float("nan"))
        assert torch.allclose(picture.whole(), expected, atol=1e-6)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.reshape(1, -1),
        lambda x: x[:, :, 1:],
        lambda x: x.sum(),
        lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x: functional.interpolate(x, scale_factor=1.5, mode="nearest"),
        lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: functional.pad(x, (0, 0, -1, 0)),
        lambda x: functional.dropout(x, 0.5, True),
        lambda x: functional.conv2d(x, torch.ones(4, 4, 3, 3), padding="same"),
        lambda x: x + torch.ones(6),
        lambda x: x + functional.pad(x, (1, 0)),
        lambda x: x.to("meta"),
    ],
)
def test_what_nobody_knows_is_refused(operation: Callable) -> None:
    with pytest.raises(Untileable):
        operation(banded(torch.randn(1, 4, 6, 6), space()))


def test_what_torch_refuses_is_refused_alike() -> None:
    picture = banded(torch.randn(1, 4, 6, 6).double(), space())
    with pytest.raises(RuntimeError):
        nn.Conv2d(4, 4, 3, padding=1)(picture)
    with pytest.raises(RuntimeError):
        nn.GroupNorm(3, 3)(picture)


def test_autocast_gives_the_types_it_gives_to_tensors() -> None:
    x, norm, convolution = torch.randn(1, 4, 6, 6), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = convolution(banded(x, space()))
        assert half.dtype == convolution(x).dtype == torch.bfloat16
        assert norm(half).dtype == norm(convolution(x)).dtype
        got, expected = (convolution(norm(convolution(each))) for each in (banded(x, space()), x))
        assert (got.whole() - expected).abs().max() <= 0.05


def test_memory_is_counted_and_given_back() -> None:
    where = space(rows=2, device_bytes=4 * 4 * 36)
    x = banded(torch.randn(1, 4, 6, 6), where)
    first = x * 1
    first.store()
    second = x * 2
    second.store()
    size = 4 * 4 * 36
    assert (where.device_now, where.host_now, where.spilled, where.restored) == (size, size, size, 0)
    second.whole()
    assert where.restored == size
    del first, second
    assert (where.device_now, where.host_now, where.device_peak, where.host_peak) == (0, 0, size, size)


def test_no_room_anywhere() -> None:
    with pytest.raises(OutOfHostMemory):
        (banded(torch.randn(1, 4, 6, 6), space(device_bytes=0, host_bytes=100)) * 2).store()


def test_every_row_of_a_spilled_picture_is_written_once_and_norms_read_none() -> None:
    where = space(rows=2, device_bytes=0)
    x, convolution, norm = torch.randn(1, 4, 6, 6), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
    with torch.no_grad():
        once = convolution(banded(x, where))
        before = where.restored
        norm(once)
    assert where.spilled == once.numel() * 4
    assert where.restored - before <= once.shape[1] * once.shape[3] * 4  # one row, for its type
