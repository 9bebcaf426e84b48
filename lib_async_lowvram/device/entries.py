"""One parameter in a unit's pack: where it lies, what it is expected to look like, and where its master and its device copy are.

Held and used by `weights.Unit` alone, on whichever thread runs that unit's network. Parameters are held weakly (I7).
"""

from __future__ import annotations

import weakref
from enum import Enum

import torch


class Change(Enum):
    """What happened to a unit's parameters since we last set them."""

    NONE = 0
    VALUES = 1  # same tensors, written in place
    LAYOUT = 2  # other tensors, dtypes, shapes, or another number of them


NONE, VALUES, LAYOUT = Change


def view_bytes(memory: torch.Tensor, offset: int, like: Entry) -> torch.Tensor:
    """`like`'s dtype, shape and strides over `memory` (uint8), `offset` bytes in."""
    flat = memory[offset : offset + like.nbytes].view(like.dtype)
    return flat.as_strided(like.shape, like.stride)


class Entry:
    """One parameter of one member: its place in the pack and what it is expected to look like."""

    __slots__ = (
        *("name", "offset", "nbytes", "dtype", "itemsize", "shape", "stride"),
        *("seen", "version", "master", "master_ptr", "device", "device_ptr", "__weakref__"),
    )

    def __init__(self, name: str, parameter: torch.Tensor, offset: int) -> None:
        self.name = name
        self.seen = weakref.ref(parameter)  # to tell another Parameter over the same bytes; keeps nothing alive
        self.offset = offset
        self.itemsize = parameter.element_size()
        self.nbytes = parameter.numel() * self.itemsize
        self.dtype = parameter.dtype
        self.shape = parameter.shape
        self.stride = parameter.stride()
        self.version = parameter._version
        self.master: torch.Tensor = parameter.data
        self.master_ptr = 0
        self.device: torch.Tensor | None = None
        self.device_ptr = 0

    def point_at(self, master: torch.Tensor, parameter: torch.Tensor | None, copy: bool) -> None:
        """Its place in `master` is its master from now on. `copy`: of the parameter's values; the parameter follows, if there is one."""
        view = view_bytes(master, self.offset, self)
        if parameter is not None:
            if copy:
                view.copy_(parameter.data)
            parameter.data = view
        self.master = view
        self.master_ptr = view.data_ptr()

    def is_published(self, parameter: torch.Tensor) -> bool:
        """Whether `parameter` points at the device memory and looks as it did when it was packed."""
        return self.device is not None and self.looks_like(parameter, self.device_ptr)

    def looks_like(self, parameter: torch.Tensor, address: int) -> bool:
        """Whether `parameter` is the one packed, at `address`, with the same dtype, shape and strides."""
        return (
            self.seen() is parameter
            and parameter.data_ptr() == address
            and parameter.dtype is self.dtype
            and parameter.shape == self.shape
            and parameter.stride() == self.stride
        )
