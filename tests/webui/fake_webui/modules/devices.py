"""The device and its garbage collection; `collections` counts calls that reached the real thing."""

import contextlib

import torch

cpu = torch.device("cpu")
device = torch.device("cpu")
dtype = torch.float32
collections = 0


def without_autocast(disable=False):
    return contextlib.nullcontext()


def torch_gc():
    global collections
    collections += 1


def autocast(disable=False):
    return contextlib.nullcontext()
