"""A UNet pass that runs out of memory, for tests of what happens then."""

from __future__ import annotations

import logging

import pytest
import tiny_models
import torch
from moving_rig import expected, job

from lib_async_lowvram.webui.memory_errors import DOGGETTX


class Hungry:
    """Computing, in front of one module, that needs all memory that is free and a little more, in one pass: a hook on it. With
    `give_up`, it does not even try when that is not free, as Doggettx does."""

    def __init__(self, integration, module, *, at=2, give_up=False, always=False):
        self.integration, self.at, self.give_up, self.always = integration, at, give_up, always
        self.calls = self.failed = self.needed = 0
        self.streams = None
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.calls += 1
        if self.calls < self.at or (self.calls > self.at + 1 and not self.always):
            return
        if self.streams is None:
            self.streams = self.integration.movers[-1].streams.sibling()  # with books of its own
        streams = self.streams
        if self.calls == self.at or self.always:
            self.needed = streams.free_memory() + 512
        if self.give_up and self.needed > streams.free_memory():
            self.failed += 1
            raise RuntimeError(f"{DOGGETTX} (max approx. 448x448). Need: 1.2GB free, Have:0.5GB free")
        try:
            streams.free(streams.allocate(self.needed))
        except torch.cuda.OutOfMemoryError:
            self.failed += 1
            raise


@pytest.fixture
def lines(caplog):
    """What the seam logged."""
    caplog.set_level(logging.INFO, logger="async_lowvram")
    return lambda: [record.getMessage() for record in caplog.records if "UNet pass" in record.getMessage()]


def managed(webui, kind="sd1"):
    model = webui.sd_models.load_model(lambda: tiny_models.make(kind))
    for _ in range(2):
        assert torch.equal(job(webui, model), expected(kind))
    return model
