"""docs/examples/diffusers_pipeline.py: the picture that the plain pipeline makes, bit for bit, from a model in memory and from a folder.

Needs the extra `standalone`. The example is run as a user would, by its file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lib_async_lowvram import OffloadConfig
from lib_async_lowvram.claims import Refused
from lib_async_lowvram.device.simulated import SimulatedStreams

pytest.importorskip("diffusers", reason="the extra `standalone`")

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "diffusers_pipeline.py"
STEPS = 4


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("diffusers_pipeline_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(pipeline, seed: int) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    return pipeline("a lighthouse at dusk", num_inference_steps=STEPS, generator=noise, output_type="np").images


def test_the_plain_pipelines_picture_within_the_budget(example: ModuleType) -> None:
    pipeline = example.tiny_pipeline()
    plain = type(pipeline)
    expected = [picture(pipeline, seed) for seed in (1, 2)]
    streams = SimulatedStreams(capacity_bytes=64 << 20, bandwidth=2e9, latency=1e-5, jitter_seconds=1e-4, seed=5)
    config = OffloadConfig(budget_bytes=1 << 20, small_leaf_bytes=0, check_placement=True)
    try:
        with example.moved(pipeline, config, streams) as mover:
            found = [picture(pipeline, seed) for seed in (1, 2)]
            status = mover.status()
    finally:
        streams.close()
    for one, other in zip(expected, found, strict=True):
        assert np.isfinite(one).all() and np.array_equal(one, other)
    assert status["state"] == "active" and status["placement_faults"] == 0 and not mover.demoted, status["last_error"]
    assert set(status["networks"]) == {"text_encoder", "unet", "vae.decoder"}
    assert status["networks"]["unet"]["streamed_bytes"] > status["networks"]["unet"]["weight_bytes"]
    assert all(each["streamed_bytes"] > 0 for each in status["networks"].values())
    assert status["peak_weight_bytes"] <= max(each["budget_bytes"] for each in status["networks"].values())
    # Outside of it the pipeline is what it was.
    assert type(pipeline) is plain and np.array_equal(expected[0], picture(pipeline, 1))


def test_where_somebody_else_moves_a_component_nothing_is_touched(example: ModuleType) -> None:
    accelerate = pytest.importorskip("accelerate")
    pipeline = example.tiny_pipeline()
    plain = type(pipeline)
    accelerate.cpu_offload(pipeline.unet, torch.device("cpu"))
    with pytest.raises(Refused, match="is moved by accelerate"), example.moved(pipeline, OffloadConfig(), "simulated"):
        pass
    assert type(pipeline) is plain


def test_from_a_folder_by_its_command_line(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same picture as the plain pipeline's, through a file of 8 bits a value."""
    from PIL import Image

    example.tiny_pipeline(seed=3).save_pretrained(tmp_path / "model")
    out = tmp_path / "picture.png"
    given = ["--model", str(tmp_path / "model"), "--steps", str(STEPS), "--seed", "7", "--budget", "1", "--device", "simulated"]
    assert example.main([*given, "--out", str(out)]) == 0
    (values,) = picture(example.tiny_pipeline(seed=3), 7)
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), (values * 255).round().astype("uint8"))
    assert "unet: " in capsys.readouterr().out


def test_a_folder_without_a_model_is_said_in_one_line(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert example.main(["--model", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert "holds no model_index.json" in capsys.readouterr().err
