"""Tensors as bytes: which ones can travel as a plain copy, where they lie in memory, and who shares memory with whom.

Problem: packing copies bytes, so it must know exactly which tensors *are* their bytes, and must not tear apart what shares
them. Pure questions about tensors and modules; no unit, no stream. Called by `weights`, `loose` and `unit_table`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def packable(tensor: torch.Tensor, *, inference: bool = False) -> bool:
    """Whether a tensor can travel as bytes: plain, strided, dense, with memory of its own.

    Subclasses, sparse, quantised, expanded or overlapping tensors cannot, nor meta tensors; those move as stock moves them.
    Nor those born in inference mode, unless `inference`: they have no version, and their data cannot be assigned.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return False
    if tensor.is_inference() and not inference:
        return False
    if tensor.is_quantized or tensor.device.type == "meta" or tensor.numel() == 0 or tensor.is_conj() or tensor.is_neg():
        return False
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=False) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor as a one-dimensional uint8 tensor over the same storage."""
    nbytes = tensor.numel() * tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return flat.set_(tensor.untyped_storage(), tensor.storage_offset() * tensor.element_size(), (nbytes,), (1,))


def byte_range(tensor: torch.Tensor) -> tuple[int, int]:
    """[start, end) addresses of a dense tensor."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def group_by_sharing(modules: Sequence[nn.Module]) -> tuple[list[list[nn.Module]], list[nn.Module]]:
    """(groups, unmanaged): modules that own packable parameters, those that share bytes with each other in one group.

    Two parameters may be the same bytes (tied); a module with one that overlaps another only in part is unmanaged, since
    packing would tear them apart. Order of first appearance is kept.
    """
    spans: list[tuple[torch.device, int, int, int]] = []
    for number, module in enumerate(modules):
        for parameter in module._parameters.values():
            if parameter is not None and packable(parameter):
                spans.append((parameter.device, *byte_range(parameter), number))
    leader = list(range(len(modules)))

    def find(number: int) -> int:
        while leader[number] != number:
            number = leader[number]
        return number

    torn: set[int] = set()
    reach: tuple[torch.device, int, int, int] | None = None  # the span reaching furthest so far
    for span in sorted(spans, key=lambda span: (str(span[0]), span[1], -span[2])):
        device, start, end, number = span
        if reach is not None and reach[0] == device and start < reach[2]:
            if (start, end) == reach[1:3]:
                first, second = sorted((find(number), find(reach[3])))
                leader[second] = first
            else:
                torn |= {number, reach[3]}
        if reach is None or reach[0] != device or end > reach[2]:
            reach = span
    torn_groups = {find(number) for number in torn}
    groups: dict[int, list[nn.Module]] = {}
    for number in dict.fromkeys(number for _, _, _, number in sorted(spans, key=lambda span: span[3])):
        groups.setdefault(find(number), []).append(modules[number])
    unmanaged = [module for number in torn_groups for module in groups[number]]
    return [group for number, group in groups.items() if number not in torn_groups], unmanaged
