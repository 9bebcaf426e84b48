"""The demo's UNet: SD1.5's shape exactly, an output that reacts to everything, weights that depend on the seed alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from lib_async_lowvram.bench.shapes import group_count, sdxl_shape
from lib_async_lowvram.bench.unet import (
    ResBlock,
    SpatialTransformer,
    empty_unet,
    kept,
    load_checkpoint,
    load_unet,
    regions,
    sd15,
    seeded_weights,
    write_checkpoint,
)


def inputs(batch: int = 1, size: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, size, size), torch.linspace(900, 100, batch), torch.randn(batch, 77, 768)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sd15_has_the_parameters_of_sd15():
    model = sd15(320, seed=None)
    assert count(model) == 859_520_964
    # The blocks of CompVis' v1 UNet, by its published shapes.
    assert count(model.time_embed) == 2_050_560
    assert count(model.input_blocks[0]) == 11_840
    assert count(model.input_blocks[3]) == 921_920
    assert [type(layer) for layer in model.middle_block] == [ResBlock, SpatialTransformer, ResBlock]
    assert (len(model.input_blocks), len(model.output_blocks)) == (12, 12)
    assert [any(isinstance(layer, SpatialTransformer) for layer in block) for block in model.input_blocks] == [
        *(False, True, True, False, True, True, False, True, True, False, False, False)
    ]
    assert [any(isinstance(layer, SpatialTransformer) for layer in block) for block in model.output_blocks] == [False] * 3 + [True] * 9
    assert len(regions(model)) == 26
    assert count(model) - sum(map(count, regions(model))) == count(model.out)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {32}


def transformers(blocks: torch.nn.ModuleList) -> list[int]:
    """Transformer blocks in each block."""
    return [sum(len(layer.blocks) for layer in block if isinstance(layer, SpatialTransformer)) for block in blocks]


def test_sdxl_has_the_parameters_of_sdxl():
    model = empty_unet(sdxl_shape(320))
    assert count(model) == 2_567_463_684
    assert transformers(model.input_blocks) == [0, 0, 0, 0, 2, 2, 0, 10, 10]
    assert transformers(model.output_blocks) == [10, 10, 10, 2, 2, 2, 0, 0, 0]
    assert len(model.middle_block[1].blocks) == 10 and model.middle_block[1].blocks[0].attn_self.heads == 20
    assert len(regions(model)) == 1 + 9 + 1 + 9
    assert count(model) - sum(map(count, regions(model))) == sum(map(count, kept(model)))
    assert count(model.label_emb) == 2816 * 1280 + 1280 + 1280 * 1280 + 1280


def test_sdxl_reacts_to_every_parameter_and_input():
    shape = sdxl_shape(8)
    model = load_unet(shape, seeded_weights(empty_unet(shape), 3)).requires_grad_(True)
    given = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 100.0]), torch.randn(2, 77, 2048), torch.randn(2, 2816)
    output = model(*given)
    assert output.shape == given[0].shape and output.isfinite().all()
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-6, name
    with torch.no_grad():
        assert not torch.equal(model(*given[:3], given[3] * 1.1), output)


def test_the_output_reacts_to_every_parameter_and_input():
    model = sd15(16, seed=3).requires_grad_(True)
    latent, timesteps, context = inputs(size=16)
    output = model(latent, timesteps, context)
    assert output.shape == latent.shape and output.isfinite().all()
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-6, name
    with torch.no_grad():
        assert not torch.equal(model(latent + 0.01, timesteps, context), output)
        assert not torch.equal(model(latent, timesteps - 1, context), output)
        assert not torch.equal(model(latent, timesteps, context.flip(1) * 1.1), output)


def test_a_batch_is_its_pictures():
    model = sd15(16)
    latent, timesteps, context = inputs(batch=2)
    with torch.no_grad():
        both = model(latent, timesteps, context)
        one = model(latent[1:], timesteps[1:], context[1:])
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(320, 32), (128, 32), (96, 32), (64, 16), (32, 8), (16, 4), (8, 2)])
def test_groups_adapt_to_the_width(channels, groups):
    assert group_count(channels) == groups


@pytest.mark.parametrize("channels", [0, -8, 4, 100])
def test_a_width_the_heads_do_not_divide(channels):
    with pytest.raises(ValueError, match="multiple of 8"):
        sd15(channels, seed=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_checkpoint(tmp_path, dtype):
    path = tmp_path / "unet.safetensors"
    nbytes = write_checkpoint(path, seed=5, channels=8, dtype=dtype)
    state = torch.random.get_rng_state()
    model, again = load_checkpoint(path), sd15(8, seed=5, dtype=dtype)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.channels == 8 and not model.training
    assert nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
    for (name, left), (_, right) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert left.device.type == "cpu" and left.dtype == dtype and not left.requires_grad, name
        assert torch.equal(left, right), name
    assert not torch.equal(model.out[2].weight, sd15(8, seed=6, dtype=dtype).out[2].weight)


def test_another_file(tmp_path):
    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="was not written by write_checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")
