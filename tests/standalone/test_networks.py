"""Networks over a file: nothing is copied, nothing is read before it is wanted, nothing stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("diffusers")

from lib_async_lowvram.standalone.checkpoint import Checkpoint
from lib_async_lowvram.standalone.errors import CannotMake
from lib_async_lowvram.standalone.families import SD15, SDXL, Family, family_of
from lib_async_lowvram.standalone.main_memory import MainMemory
from lib_async_lowvram.standalone.making import Maker
from lib_async_lowvram.standalone.networks import build
from lib_async_lowvram.standalone.precision import Computing
from lib_async_lowvram.standalone.request import Request
from tests.standalone.make_checkpoint import NAMES, shapes
from tests.standalone.tiny import TINY_SD15, TINY_SDXL, tiny_file

tiny = pytest.mark.parametrize("family", [TINY_SD15, TINY_SDXL], ids=lambda family: family.name)


@tiny
def test_every_parameter_lies_in_the_file(tmp_path: Path, family: Family) -> None:
    checkpoint = Checkpoint(tiny_file(tmp_path, family))
    networks = build(checkpoint, family)
    for module in (networks.unet, networks.vae, *networks.text):
        for name, parameter in module.named_parameters():
            assert checkpoint.in_file(parameter) and not parameter.requires_grad, name
        assert not any(buffer.device.type == "meta" for buffer in module.buffers())
    assert checkpoint.file.read_bytes == 0


@pytest.mark.parametrize("family", [SD15, SDXL], ids=lambda family: family.name)
def test_the_real_shapes(tmp_path: Path, family: Family) -> None:
    """All of them, over a file with holes: nothing is read, so nothing needs to be there."""
    import json
    import math

    header, at = {}, 0
    for name, shape in shapes(family).items():
        nbytes = math.prod(shape) * 2
        header[name] = {"dtype": NAMES[torch.float16], "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "holes.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    checkpoint = Checkpoint(path)
    assert family_of(checkpoint.tensors) is family
    networks = build(checkpoint, family)
    modules = (networks.unet, networks.vae, *networks.text)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    assert all(checkpoint.in_file(parameter) for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) * 2 == at  # and no weight is left over
    assert checkpoint.file.read_bytes == 0


@tiny
def test_the_mover_holds_no_weights_between_stages(tmp_path: Path, family: Family) -> None:
    request = Request(tiny_file(tmp_path, family), "dusk", 64, 64, 1, 800 << 20)
    maker = Maker(request, lambda line: None, lambda stage, share: None, family)
    try:
        status = maker.mover.status()
        total = sum(network["weight_bytes"] for network in status["networks"].values())
        assert status["file_bytes"] == total > 0 and status["host_bytes"] == 0
        with torch.no_grad():
            maker.encode()
            maker.denoise(maker.encode())
        status = maker.mover.status()
        assert status["file_bytes"] == total and status["host_bytes"] == status["staging_bytes"]
        assert maker.streams.allocated_bytes == 0 and status["last_error"] == "" and status["reason"] == ""
        assert 0 < status["file_read_bytes"]
    finally:
        maker.close()


def test_incomplete_checkpoints(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(str(tiny_file(tmp_path, TINY_SD15)))
    for lost, says in (("model.diffusion_model.out.2.weight", "UNet"), ("first_stage_model.quant_conv.bias", "VAE")):
        path = tmp_path / "less.safetensors"
        save_file({name: tensor for name, tensor in weights.items() if name != lost}, str(path))
        with pytest.raises(CannotMake, match=f"no weights for .* of the SD1.5 {says}"):
            build(Checkpoint(path), TINY_SD15)
    encoder = TINY_SD15.text[0].prefix + "text_model."
    save_file({name.replace(encoder, TINY_SD15.text[0].prefix): tensor for name, tensor in weights.items()}, str(path))
    build(Checkpoint(path), TINY_SD15)  # as some programs that merge models write it
    save_file({name: tensor.to(torch.float64) for name, tensor in weights.items()}, str(path))
    with pytest.raises(CannotMake, match="is stored as F64"):
        build(Checkpoint(path), TINY_SD15)


def test_memory_that_is_given_back_is_gone() -> None:
    streams = MainMemory()
    try:
        block = streams.allocate(1 << 20)
        streams.free(block)
        assert streams.allocated_bytes == 0 and streams._memory._recycled_bytes == 0
    finally:
        streams.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computing_in_another_type(dtype: torch.dtype) -> None:
    """As with converted weights, bit for bit; nothing is changed."""
    torch.manual_seed(1)
    layers = [torch.nn.Conv2d(4, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3)]
    net = torch.nn.Sequential(*layers).half()
    x = torch.randn(2, 4, 8, 8).to(dtype)
    with torch.no_grad(), Computing(dtype):
        found = net(x)
        words = functional.embedding(torch.tensor([1, 0]), torch.ones(2, 3, dtype=torch.float16))
    assert found.dtype == words.dtype == dtype and net[0].weight.dtype == torch.float16
    with torch.no_grad():
        assert torch.equal(found, net.to(dtype)(x))


def test_conversions_are_kept_as_long_as_they_are_asked_for() -> None:
    layer = torch.nn.Linear(4, 4).half()
    x, mode = torch.ones(1, 4), Computing(torch.float32)
    seen: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func is torch.ops.aten._to_copy.default)
            return func(*args, **(kwargs or {}))

    def conversions(times: int) -> int:
        seen.clear()
        with Count(), torch.no_grad(), mode:
            for _ in range(times):
                layer(x)
        return sum(seen)

    assert conversions(3) == 6  # weight and bias
    with mode.keeping():
        assert conversions(3) == 2
        with mode.keeping():
            assert conversions(1) == 0
        assert conversions(1) == 0
    assert conversions(1) == 2
