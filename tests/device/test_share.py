"""Memory that others keep views of: it keeps its bytes until the last view is gone, whatever is freed or discarded."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram.device.cuda import CudaStreams
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from tests.device.test_cuda import Fake
from tests.mover.chains import simulated


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("poison", [True, False])
def test_a_shared_block_keeps_its_bytes_beyond_free(poison: bool, recorded: bool) -> None:
    inner = simulated(SimulatedStreams, poison=poison)
    streams = RecordingStreams(inner) if recorded else inner
    block, other = streams.allocate(1024), streams.allocate(1024)
    for each in (block, other):
        each.fill_(7)
    view = block[256:512]
    streams.share(block, streams.current_stream())
    now = streams.record(streams.current_stream())
    assert streams.discard(view, now) is not None
    assert view.eq(7).all()
    streams.free(block, (now,))
    assert view.eq(7).all()
    assert streams.allocated_bytes == 1024
    streams.free(other, (now,))
    assert streams.allocated_bytes == 0
    # Neither is its memory handed out again while the view lives, nor is what comes next shared.
    following = [streams.allocate(1024) for _ in range(3)]
    assert view.data_ptr() not in {each.data_ptr() + 256 for each in following}
    for each in following:
        each.fill_(1)
        streams.free(each, (streams.record(streams.current_stream()),))
    assert view.eq(7).all()
    assert not poison or all(each.eq(255).all() for each in following)
    inner.close()


def test_only_a_living_block_can_be_shared() -> None:
    streams = simulated()
    block = streams.allocate(512)
    streams.free(block)
    with pytest.raises(ValueError, match="living block"):
        streams.share(block, streams.current_stream())
    streams.close()


def test_cuda_tells_the_allocator_which_stream_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, told = Fake(monkeypatch), []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append((tensor.numel(), stream)))
    streams = CudaStreams("cuda:1")
    block = streams.allocate(512)
    streams.share(block, fake.current)
    assert told == [(512, fake.current)]
