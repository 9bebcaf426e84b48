"""Networks whose weights stay in their file: the same bits, no block in main memory but for what somebody changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Event, Stream, Streams, align
from lib_async_lowvram.device.weight_file import WeightsChanged
from lib_async_lowvram.shadow import Shadow
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, call, handed_over, judged, pair, recorded, same, simulated
from tests.mover.trees import put_in_file

RING = 2 * LEAF_BYTES


class Rig:
    """A chain in a file under a mover, and its twin."""

    def __init__(self, streams: Streams, path: Path, budget: int = 1, pinned: int = 0, make: Callable = Chain) -> None:
        self.streams = streams
        self.net, self.twin = pair(make)
        for each in (*self.net.modules(), *self.twin.modules()):
            if isinstance(each, Leaf):
                each.bias = nn.Parameter(torch.tensor([0.25]))
        self.file = put_in_file(self.net, path)
        self.mover = AsyncModelMover(
            OffloadConfig(budget_bytes=budget, small_leaf_bytes=0, check_placement=True, pinned_limit_bytes=pinned), streams
        )
        self.mover.host.files.append(self.file)
        self.mover.attach({"net": self.net})

    def passes(self, number: int = 3) -> None:
        for _ in range(number):
            same(self.net, self.twin, self.streams)

    def change(self, place: int, how: Callable[[Leaf], None]) -> None:
        for each in (self.net, self.twin):
            with torch.no_grad():
                how(each.leaves[place])

    @property
    def weight_bytes(self) -> int:
        return len(self.net.leaves) * (LEAF_BYTES + align(4))


@pytest.fixture(params=["recorded", "jittery"])
def streams(request) -> Streams:
    return recorded(poison=True) if request.param == "recorded" else simulated(bandwidth=2e8, jitter_seconds=2e-4, seed=3, poison=True)


def judged_well(rig: Rig) -> dict:
    if isinstance(rig.streams, RecordingStreams):
        rig.streams.check()
    status = rig.mover.status()
    assert status["placement_faults"] == 0, status["last_error"]
    assert status["state"] == "active"
    return status


@pytest.mark.parametrize("budget", [1, 5 * LEAF_BYTES, 1 << 20])
def test_the_same_bits_and_nothing_in_memory(streams: Streams, tmp_path: Path, budget: int) -> None:
    rig = Rig(streams, tmp_path / "weights", budget)
    rig.passes(4)
    status = judged_well(rig)
    assert status["file_bytes"] == rig.weight_bytes and status["host_bytes"] == status["staging_bytes"] > 0
    assert status["file_read_bytes"] > 0 and status["file_read_seconds"] > 0
    assert status["networks"]["net"]["pinned_bytes"] == 0
    rig.mover.drain()
    assert streams.allocated_bytes == 0
    for mine, theirs in zip(rig.net.parameters(), rig.twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    rig.passes(2)
    rig.mover.detach()
    assert all(rig.file.offset_of(parameter) is not None for parameter in rig.net.parameters())
    if isinstance(streams, RecordingStreams):
        for mine, theirs in zip(rig.net.parameters(), rig.twin.parameters(), strict=True):
            theirs.data = mine.data  # on some CPUs where a matrix begins decides its product's last bits
        rig.passes(1)


def test_what_is_read_is_what_streams(tmp_path: Path) -> None:
    """What was used was read; what is on its way to the next pass may have been, or not yet."""
    rig = Rig(simulated(), tmp_path / "weights")
    rig.passes(4)
    before = rig.mover.status()
    rig.passes(3)
    after = rig.mover.status()
    # Without the padding of the pack.
    streamed = (after["streamed_bytes"] - before["streamed_bytes"]) // (LEAF_BYTES + align(4))
    read, rest = divmod(after["file_read_bytes"] - before["file_read_bytes"], LEAF_BYTES + 4)
    ahead = 2
    assert streamed == 3 * 6 and streamed - ahead <= read <= streamed + ahead
    assert rest in (0, LEAF_BYTES, 4)  # looked at in the middle of a leaf, now or then
    assert after["staged_bytes"] - before["staged_bytes"] == after["streamed_bytes"] - before["streamed_bytes"]
    assert after["misses"] == before["misses"] and after["host_waits"] == 0


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
def test_a_leaf_that_is_changed_gets_memory_of_its_own(streams: Streams, tmp_path: Path, place: int, inside: bool, budget: int) -> None:
    rig = Rig(streams, tmp_path / "weights", budget)
    rig.passes()
    content = rig.file.path.read_bytes()
    for number in range(2):
        if inside:
            for each in (rig.net, rig.twin):
                each.leaves[place].inside = lambda leaf: leaf.weight.mul_(0.5)
        else:
            rig.change(place, lambda leaf: leaf.weight.mul_(0.5))
        rig.passes(2)
        status = judged_well(rig)
        assert status["file_bytes"] == rig.weight_bytes - LEAF_BYTES - align(4), number
    rig.mover.drain()
    for mine, theirs in zip(rig.net.parameters(), rig.twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert rig.file.path.read_bytes() == content
    rig.passes(2)


@pytest.mark.parametrize(
    "how",
    [
        lambda leaf: setattr(leaf, "weight", nn.Parameter(leaf.weight * 0.5)),
        lambda leaf: setattr(leaf.weight, "data", leaf.weight.detach() * 0.5),
        lambda leaf: setattr(leaf, "bias", None),
    ],
    ids=["replaced", "assigned", "taken away"],
)
def test_other_tensors(streams: Streams, tmp_path: Path, how: Callable[[Leaf], None]) -> None:
    rig = Rig(streams, tmp_path / "weights")
    rig.passes()
    rig.change(2, how)
    rig.passes()
    assert judged_well(rig)["adopted"] == 1


def test_a_change_nobody_sees_but_tells(streams: Streams, tmp_path: Path) -> None:
    rig = Rig(streams, tmp_path / "weights")
    rig.passes()
    rig.change(3, lambda leaf: leaf.weight.data.mul_(0.5))
    assert rig.mover.mark_dirty(rig.net.leaves[3])
    rig.passes()
    assert judged_well(rig)["file_bytes"] < rig.weight_bytes


def test_a_change_nobody_sees_but_tells_in_a_leaf_that_is_packed_anew(streams: Streams, tmp_path: Path) -> None:
    """Its bytes are no longer the file's, whoever makes the next pack, and for whatever reason."""
    rig = Rig(streams, tmp_path / "weights")
    rig.passes()
    rig.mover.drain()
    rig.change(3, lambda leaf: leaf.weight.data.mul_(0.5))
    assert rig.mover.mark_dirty(rig.net.leaves[3])
    rig.change(3, lambda leaf: setattr(leaf, "bias", None))
    rig.passes()
    judged_well(rig)


def test_load_state_dict(streams: Streams, tmp_path: Path) -> None:
    """All of it is memory from then on."""
    rig = Rig(streams, tmp_path / "weights")
    rig.passes()
    state = {key: value * 0.5 for key, value in rig.twin.state_dict().items()}
    for each in (rig.net, rig.twin):
        each.load_state_dict(state)
    rig.passes()
    assert judged_well(rig)["file_bytes"] == 0


@pytest.mark.parametrize("place", range(6))
def test_an_error_in_the_middle_of_a_changed_pass(streams: Streams, tmp_path: Path, place: int) -> None:
    """What was written on the device comes home to memory, not to the file."""

    def fail(leaf: Leaf) -> None:
        leaf.weight.mul_(0.5)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    rig = Rig(streams, tmp_path / "weights")
    rig.passes()
    for each in (rig.net, rig.twin):
        each.leaves[place].inside = fail
        with pytest.raises(torch.cuda.OutOfMemoryError), torch.no_grad():
            call(each, streams) if each is rig.net else each(torch.ones(1, 8))
    rig.passes()
    judged_well(rig)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("gradients", [False, True])
def test_changed_while_regions_move(streams: Streams, tmp_path: Path, place: int, gradients: bool) -> None:
    """In the very first pass, or in one with gradients."""
    rig = Rig(streams, tmp_path / "weights")
    if gradients:
        rig.passes(2)
    for each in (rig.net, rig.twin):
        each.leaves[place].inside = lambda leaf: leaf.weight.mul_(0.5)
    with torch.no_grad():
        expected = rig.twin(X)
    with judged(streams), torch.set_grad_enabled(gradients):
        assert torch.equal(rig.net(X), expected)
    rig.passes(2)
    assert judged_well(rig)["file_bytes"] == rig.weight_bytes - LEAF_BYTES - align(4)


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("budget", [1, 5 * LEAF_BYTES])
def test_changed_before_our_own_work_failed(tmp_path: Path, place: int, budget: int) -> None:
    """What was written on the device comes home to memory of its own, from a unit in use as from a resident."""
    rig = Rig(simulated(), tmp_path / "weights", budget)
    rig.passes()
    network = rig.mover._networks["net"]

    def change_and_fail(leaf: Leaf) -> None:
        leaf.weight.mul_(0.5)
        error = torch.cuda.OutOfMemoryError("CUDA out of memory")
        with network.context.lock:  # as the hook of the next leaf would, whatever the plan
            network.met(error, goes_on=True, module=leaf)
        raise error

    rig.net.leaves[place].inside = change_and_fail
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(rig.net, rig.streams)
    assert torch.equal(rig.net.leaves[place].weight, rig.twin.leaves[place].weight * 0.5)
    assert rig.streams.allocated_bytes == 0 and rig.mover.status()["file_bytes"] == rig.weight_bytes - LEAF_BYTES - align(4)
    rig.twin.leaves[place].weight.data.mul_(0.5)
    rig.passes(2)


class LoggingStreams(SimulatedStreams):
    """Writes down copies to the device, and what the host waited for."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.pending: list[object] = []  # events after copies from memory that is not pinned
        self.late = 0

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        super().copy(destination, source, stream)
        if stream is self.onload_stream and source.numel() >= LEAF_BYTES and not self.is_pinned(source.data_ptr(), source.numel()):
            self.late += len(self.pending)
            self.pending.append(None)

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        event = super().record(stream, timing=timing)
        if stream is self.onload_stream:
            self.pending = [event if each is None else each for each in self.pending]
        return event

    def synchronize(self, event: Event) -> None:
        super().synchronize(event)
        self.pending = [each for each in self.pending if each is not event]


def test_what_is_read_for_one_copy_lives_until_that_is_done(tmp_path: Path) -> None:
    """`Streams.copy` leaves that to the caller; no device that runs here would show it."""
    streams = simulated(LoggingStreams)
    streams.pin = lambda address, nbytes: False
    rig = Rig(streams, tmp_path / "weights")
    rig.passes(3)
    assert rig.mover.status()["staging_bytes"] == 0 and rig.mover.status()["streamed_bytes"] > 0
    assert streams.late == 0 and not streams.pending


def test_without_a_ring(tmp_path: Path) -> None:
    """Pinning is refused: a unit is read into a block of its own and copied from there, and the block is gone afterwards."""
    streams = recorded()
    streams.inner.pin = lambda address, nbytes: False
    rig = Rig(streams, tmp_path / "weights")
    rig.passes(4)
    status = judged_well(rig)
    assert status["staging_bytes"] == 0 and status["host_bytes"] == 0 and status["file_bytes"] == rig.weight_bytes


def test_a_part_in_memory_and_a_small_limit(streams: Streams, tmp_path: Path) -> None:
    rig = Rig(streams, tmp_path / "weights", pinned=3 * LEAF_BYTES)
    rig.change(0, lambda leaf: leaf.weight.mul_(0.5))
    rig.change(4, lambda leaf: leaf.weight.mul_(0.5))
    rig.passes(4)
    status = judged_well(rig)
    assert status["file_bytes"] == rig.weight_bytes - 2 * (LEAF_BYTES + align(4))
    assert status["pinned_bytes"] <= 3 * LEAF_BYTES


def test_drained_and_run_by_other_threads(tmp_path: Path) -> None:
    streams = recorded()
    rig = Rig(streams, tmp_path / "weights")
    rig.passes()
    for _ in range(3):
        handed_over(rig.mover.drain, streams)
        handed_over(rig.passes, streams)
    judged_well(rig)


def test_a_file_that_is_changed_meanwhile(tmp_path: Path) -> None:
    """The pass fails with the file's name, and not with a wrong picture; so does the next one."""
    rig = Rig(simulated(), tmp_path / "weights")
    rig.passes()
    with rig.file.path.open("r+b") as written:
        written.write(b"x")
    written_to = rig.file.path.stat()
    os.utime(rig.file.path, ns=(written_to.st_atime_ns, written_to.st_mtime_ns + 10))
    for _ in range(2):
        with pytest.raises(WeightsChanged, match="changed while"):
            for _ in range(3):
                call(rig.net, rig.streams)
    rig.mover.drain()
    assert rig.streams.allocated_bytes == 0
    assert "changed while" in rig.mover.status()["last_error"]


def test_the_previews_copy_reads_the_file_as_well(tmp_path: Path) -> None:
    """On a thread that may wait: without a ring of its own, one unit at a time."""
    rig = Rig(simulated(), tmp_path / "weights")
    rig.passes()
    rig.mover.drain()
    masters = rig.mover.masters(["net"])
    shadow = Shadow(rig.net, lambda parameter: masters.get(id(parameter)))
    sibling = simulated()
    mover = AsyncModelMover(OffloadConfig(budget_bytes=1, small_leaf_bytes=0), sibling, host=rig.mover.host)
    mover.attach({"net": shadow.module})
    before = rig.mover.host.host_bytes
    for _ in range(3):
        same(shadow.module, rig.twin, sibling)
        rig.passes(1)
    assert mover.status()["file_bytes"] == rig.weight_bytes and rig.mover.host.host_bytes <= before + rig.mover.status()["staging_bytes"]
    mover.close()
