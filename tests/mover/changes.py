"""What others do to a leaf's weights: in place, another Parameter, other data, one more."""

from __future__ import annotations

import torch
from torch import nn

from tests.mover.chains import Leaf


def halve(leaf: Leaf) -> None:
    leaf.weight.mul_(0.5)


def replace(leaf: Leaf) -> None:
    leaf.weight = nn.Parameter(leaf.weight * 0.5)


def assign(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight * 0.5


def give_bias(leaf: Leaf) -> None:
    leaf.bias = nn.Parameter(torch.linspace(0.0, 1.0, 8))


CHANGES = [halve, replace, assign, give_bias]
