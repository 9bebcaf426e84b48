"""What else a user could pick on a CUDA GPU: accelerate, diffusers' group offloading, mmgp; on diffusers' own UNet.

Problem: each of them must be used as its authors say, on the model it is made for, and what they are measured against must be
computed by the same kernels. So `diffusers-resident`, the same model with everything on the device, is run beside them: it
gives their reference outputs, and shows what diffusers' UNet costs without any moving.

- `accelerate`             - `cpu_offload`: every leaf is copied before its forward and dropped after it.
- `diffusers-group`        - `apply_group_offloading`, leaf level, with a copy stream: one leaf ahead, pinned.
- `diffusers-group-record` - the same with `record_stream`.
- `mmgp`                   - `offload.all` with pinned memory and a budget: whole blocks, one ahead.

These packages are optional: they are imported by `setup`, and `why_not` says what is missing. Their own errors are theirs: who
runs them reports them beside the others' figures. Called on the thread that runs the model.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from lib_async_lowvram.bench import diffusers_unet
from lib_async_lowvram.bench.contenders import Contender, Inputs, Measured, Resident, weight_bytes
from lib_async_lowvram.device.streams import Streams

MMGP_SHARE = 0.25
"""Of the weights, as mmgp's budget: it says itself that it uses up to twice that."""


class Peer(Contender):
    """A contender that acts on diffusers' model by itself, through torch's allocator."""

    def call(self, inputs: Inputs) -> torch.Tensor:
        return self.model(**diffusers_unet.arguments(inputs))[0]

    def measured(self) -> Measured:
        return Measured(None, {})

    def pinned_bytes(self) -> int | None:
        return None

    def close(self) -> None:
        # What it put on the device goes with the model, whose hooks hold it.
        self.model = nn.Identity()
        torch.cuda.empty_cache()


class DiffusersResident(Resident):
    """All weights of diffusers' model in one block of device memory."""

    name = "diffusers-resident"

    def call(self, inputs: Inputs) -> torch.Tensor:
        return self.model(**diffusers_unet.arguments(inputs))[0]


class Accelerate(Peer):
    """https://huggingface.co/docs/accelerate/package_reference/big_modeling: `cpu_offload`."""

    name = "accelerate"

    def setup(self) -> None:
        from accelerate import cpu_offload

        cpu_offload(self.model, execution_device=self.streams.device)

    def pinned_bytes(self) -> int:
        return 0


class DiffusersGroup(Peer):
    """https://huggingface.co/docs/diffusers/optimization/memory: group offloading, leaf level."""

    name = "diffusers-group"
    record_stream = False

    def setup(self) -> None:
        from diffusers.hooks import apply_group_offloading

        with torch.cuda.device(self.streams.device):  # the stream is made on the current device
            apply_group_offloading(
                self.model,
                onload_device=self.streams.device,
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=True,
                record_stream=self.record_stream,
            )

    def pinned_bytes(self) -> int:
        """As it asked for; torch's pinned allocator rounds each tensor up to a power of two."""
        return weight_bytes(self.model)


class DiffusersGroupRecord(DiffusersGroup):
    name = "diffusers-group-record"
    record_stream = True


class Mmgp(Peer):
    """The package mmgp: `offload.all`."""

    name = "mmgp"

    def setup(self) -> None:
        from mmgp import offload

        try:
            self._manager = offload.all(
                {"unet": self.model},
                pinnedMemory=True,
                quantizeTransformer=False,
                budgets={"unet": max(1, int(MMGP_SHARE * weight_bytes(self.model) / 2**20))},
                verboseLevel=0,
            )
        finally:
            torch.set_default_device(None)  # it makes CUDA the whole process's default

    def close(self) -> None:
        manager, self._manager = getattr(self, "_manager", None), None
        if manager is not None:
            manager.release()
        super().close()


PEERS: dict[str, tuple[type[Contender], tuple[str, ...]]] = {
    "diffusers-resident": (DiffusersResident, ("diffusers",)),
    "accelerate": (Accelerate, ("accelerate", "diffusers")),
    "diffusers-group": (DiffusersGroup, ("diffusers",)),
    "diffusers-group-record": (DiffusersGroupRecord, ("diffusers",)),
    "mmgp": (Mmgp, ("mmgp", "diffusers")),
}
"""Name -> the contender, and the packages that it needs."""


def why_not(name: str, streams: Streams) -> str:
    """Why this peer cannot run here; "" when it can."""
    if streams.device.type != "cuda":
        return "needs a CUDA device"
    missing = [package for package in PEERS[name][1] if find_spec(package) is None]
    if missing:
        return f"needs {' and '.join(missing)}, not installed"
    if name == "mmgp" and streams.device.index not in (None, 0):
        return "only works on cuda:0"
    return ""


def make_peer(name: str, model: nn.Module, streams: Streams) -> Contender:
    """`model`: diffusers', on the host, for this contender alone."""
    return PEERS[name][0](model, streams)
