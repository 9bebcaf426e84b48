"""The small decoder for previews, loaded once."""

import torch
from torch import nn

loaded = []


class VAEApprox(nn.Module):
    def forward(self, x):
        return x[:, :3]


def model():
    if not loaded:
        loaded.append(VAEApprox())
    return loaded[0]


def cheap_approximation(sample):
    return torch.einsum("...lxy,lr -> ...rxy", sample, torch.eye(sample.shape[-3])[:, :3])
