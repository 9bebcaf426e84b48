"""The map from our UNet's names to diffusers': every parameter has a place of its own; where diffusers is installed, they are
its own names and shapes, and both models compute the same."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench import peers, results
from lib_async_lowvram.bench.diffusers_unet import arguments, build, configuration, map_weights
from lib_async_lowvram.bench.measuring import make_inputs
from lib_async_lowvram.bench.options import PEER_NAMES
from lib_async_lowvram.bench.shapes import sd15_shape, sdxl_shape
from lib_async_lowvram.bench.unet import empty_unet, load_unet, seeded_weights
from lib_async_lowvram.device.simulated import SimulatedStreams

both = pytest.mark.parametrize("shape_of", [sd15_shape, sdxl_shape])
installed = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers is not installed")


@both
def test_every_parameter_has_a_place_of_its_own(shape_of):
    shape = shape_of(320)
    weights = dict(empty_unet(shape).named_parameters())
    mapped = map_weights(weights, shape)
    assert len(mapped) == len(weights)
    assert {id(tensor) for tensor in mapped.values()} == {id(tensor) for tensor in weights.values()}


def test_names_as_published():
    """Of checkpoints in diffusers' layout."""
    mapped = map_weights(dict(empty_unet(sd15_shape(320)).named_parameters()), sd15_shape(320))
    for name, shape in {
        "conv_in.weight": (320, 4, 3, 3),
        "time_embedding.linear_1.weight": (1280, 320),
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "down_blocks.2.downsamplers.0.conv.weight": (1280, 1280, 3, 3),
        "down_blocks.3.resnets.0.conv1.weight": (1280, 1280, 3, 3),
        "mid_block.attentions.0.proj_in.weight": (1280, 1280, 1, 1),
        "up_blocks.0.upsamplers.0.conv.weight": (1280, 1280, 3, 3),
        "up_blocks.1.resnets.2.conv_shortcut.weight": (1280, 1920, 1, 1),
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.bias": (2560,),
        "conv_norm_out.weight": (320,),
    }.items():
        assert tuple(mapped[name].shape) == shape, name
    mapped = map_weights(dict(empty_unet(sdxl_shape(320)).named_parameters()), sdxl_shape(320))
    for name, shape in {
        "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_out.0.bias": (1280,),
        "mid_block.attentions.0.proj_out.weight": (1280, 1280),
        "up_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v.weight": (640, 2048),
        "up_blocks.2.resnets.0.conv1.weight": (320, 960, 3, 3),
        "class_embedding.linear_1.weight": (1280, 2816),
    }.items():
        assert tuple(mapped[name].shape) == shape, name
    assert not any(name.startswith(("down_blocks.0.attentions", "up_blocks.2.attentions", "up_blocks.2.upsamplers")) for name in mapped)


def test_a_parameter_without_a_place():
    with pytest.raises(KeyError, match="elsewhere"):
        map_weights({"elsewhere.weight": torch.zeros(1)}, sd15_shape(8))


@installed
@both
def test_diffusers_has_these_names_and_shapes(shape_of):
    from diffusers import UNet2DConditionModel

    shape = shape_of(320)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**configuration(shape))
    ours = map_weights(dict(empty_unet(shape).named_parameters()), shape)
    assert {name: tensor.shape for name, tensor in theirs.state_dict().items()} == {name: tensor.shape for name, tensor in ours.items()}


@installed
@both
def test_both_compute_the_same(shape_of):
    shape = shape_of(32)
    weights = seeded_weights(empty_unet(shape), 0)
    ours, theirs = load_unet(shape, weights), build(shape, weights)
    inputs = make_inputs(1, 16, 1, torch.device("cpu"), torch.float32, shape=shape)[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(**arguments(inputs))[0], ours(*inputs), rtol=1e-4, atol=1e-5)


def test_why_peers_do_not_run(monkeypatch):
    streams = SimulatedStreams(capacity_bytes=1 << 20)
    assert set(peers.PEERS) == set(PEER_NAMES)
    assert {peers.why_not(name, streams) for name in PEER_NAMES} == {"needs a CUDA device"}
    streams.device = torch.device("cuda", 1)  # as far as anybody can tell
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.why_not("mmgp", streams) == "needs mmgp and diffusers, not installed"
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    assert peers.why_not("mmgp", streams) == "only works on cuda:0" and peers.why_not("accelerate", streams) == ""
    streams.device = torch.device("cpu")
    streams.close()


@installed
@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_peers_in_a_run(monkeypatch, tmp_path):
    """Two of them also work without a GPU: how they are run and judged is the same there."""
    real = peers.why_not
    here = ("diffusers-resident", "accelerate")
    monkeypatch.setattr(peers, "why_not", lambda name, streams: "" if name in here else real(name, streams))
    path = tmp_path / "run.json"
    arguments = ["bench", "--device", "simulated", "--model", "tiny", "--contenders", "all", "--budget", "50%", "--passes", "1"]
    assert main([*arguments, "--rounds", "1", "--json", str(path)]) == 0
    case = results.read(path)["cases"][0]
    assert [result["contender"] for result in case["results"]] == ["resident", "stock", *here, "async"]
    assert [entry["contender"] for entry in case["not_run"]] == ["diffusers-group", "diffusers-group-record", "mmgp"]
    assert case["diffusers_difference"]["relative_to_largest_output"] < 1e-4
    for result in case["results"]:
        theirs = result["contender"] in here
        assert result["bitwise_equal"] and result["outputs_compared_with"] == ("diffusers-resident" if theirs else "resident")
