"""The setting "Keep weights on disk" over the real mover on the simulated device: same pictures, and main memory given back."""

from __future__ import annotations

import types

import pytest
import tiny_models
import torch
from moving_rig import expected, job, worked

from lib_async_lowvram.webui.settings import ENABLED, ON_DISK

KINDS = ["sd1", "sd2", "sdxl"]
safetensors = pytest.importorskip("safetensors.torch")


def saved(model, path, rename=lambda name: name, change=lambda name, value: value):
    """Its weights as a checkpoint, which it was loaded from."""
    weights = {rename(name): change(name, value.detach().cpu().contiguous().clone()) for name, value in model.state_dict().items()}
    safetensors.save_file(weights, path)
    model.sd_checkpoint_info = types.SimpleNamespace(filename=str(path))
    return model


@pytest.fixture
def loaded(webui, tmp_path):
    """`loaded(kind, ...)`: a model of the host, from a checkpoint."""

    def load(kind, name="model.safetensors", **kwargs):
        return webui.sd_models.load_model(lambda: saved(tiny_models.make(kind), tmp_path / name, **kwargs))

    yield load
    webui.shared.opts.data.pop(ON_DISK, None)


def in_file(integration):
    status = integration.status()
    return status["on_disk"]["in_file_bytes"], status["on_disk"]["of_bytes"]


@pytest.mark.parametrize("kind", KINDS)
def test_same_pictures(webui, moving, loaded, kind):
    model = loaded(kind)
    assert torch.equal(job(webui, model), expected(kind))
    before = moving.status()["host_bytes"]
    webui.shared.opts.data[ON_DISK] = True
    for _ in range(3):
        assert torch.equal(job(webui, model), expected(kind))
        assert in_file(moving)[0] == in_file(moving)[1] > 0
    status = worked(moving)
    assert status["file_bytes"] > 0 and status["file_read_bytes"] > 0
    assert status["host_bytes"] < before / 2
    webui.shared.opts.data[ON_DISK] = False
    for _ in range(2):
        assert torch.equal(job(webui, model), expected(kind))
    assert moving.status()["on_disk"] is None and moving.status()["file_bytes"] == 0
    assert moving.status()["adopted"] > 0 and moving.status()["host_bytes"] >= before


def test_names_of_wrapped_modules_and_no_names_at_all(webui, moving, loaded):
    webui.shared.opts.data[ON_DISK] = True
    model = loaded("sd1", rename=lambda name: name.replace(".wrapped.", "."))
    assert torch.equal(job(webui, model), expected("sd1"))
    assert in_file(moving)[0] == in_file(moving)[1]
    model = loaded("sd1", "other.safetensors", rename=lambda name: "of another program." + name)
    assert torch.equal(job(webui, model), expected("sd1"))
    assert in_file(moving)[0] == in_file(moving)[1]


def test_what_differs_stays_in_memory(webui, moving, loaded):
    """One bit of one layer, and the precision of another."""

    def change(name, value):
        if name.endswith("input_blocks.0.grow.weight"):
            value.view(torch.int32)[0, 0] ^= 1
        return value.half() if name.endswith("input_blocks.1.grow.weight") else value

    webui.shared.opts.data[ON_DISK] = True
    model = loaded("sd1", change=change)
    for _ in range(2):
        assert torch.equal(job(webui, model), expected("sd1"))
    weight = model.model.diffusion_model.input_blocks[0].grow.weight
    found, of = in_file(moving)
    assert of - found == 2 * weight.numel() * 4
    worked(moving)


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("model.ckpt", lambda path: path.write_bytes(b"PK\x03\x04"), ".ckpt file"),
        ("model.safetensors", lambda path: path.write_bytes(b"\x00" * 100), "cannot be read"),
        ("model.safetensors", lambda path: path.unlink(), "cannot be read"),
        ("model.safetensors", lambda path: safetensors.save_file({"a": torch.zeros(3)}, path), "no weight is in its checkpoint"),
    ],
    ids=["pickled", "broken", "gone", "another model"],
)
def test_why_not(webui, moving, loaded, tmp_path, caplog, name, spoil, why):
    model = loaded("sd1", name)
    spoil(tmp_path / name)
    webui.shared.opts.data[ON_DISK] = True
    for _ in range(2):
        assert torch.equal(job(webui, model), expected("sd1"))
    assert why in moving.status()["on_disk"]["why_not"] and in_file(moving)[0] == 0
    assert str(tmp_path) not in str(moving.status())
    assert sum(why in record.getMessage() for record in caplog.records) <= 1
    worked(moving)


def test_a_model_that_does_not_say(webui, moving):
    webui.shared.opts.data[ON_DISK] = True
    model = webui.sd_models.load_model(lambda: tiny_models.make("sd1"))
    try:
        assert torch.equal(job(webui, model), expected("sd1"))
        assert "does not say" in moving.status()["on_disk"]["why_not"]
    finally:
        webui.shared.opts.data.pop(ON_DISK)


def test_a_checkpoint_loaded_in_its_place(webui, moving, loaded, tmp_path):
    """Values are copied into the same Parameters: they are memory until the next job finds them in the new file."""
    webui.shared.opts.data[ON_DISK] = True
    model = loaded("sd1")
    job(webui, model)
    other = saved(tiny_models.make("sd1", seed=5), tmp_path / "other.safetensors")
    with torch.no_grad():
        model.load_state_dict(other.state_dict())
    model.sd_checkpoint_info = other.sd_checkpoint_info
    for _ in range(2):
        assert torch.equal(job(webui, model), tiny_models.picture(tiny_models.make("sd1", seed=5)))
    assert in_file(moving)[0] == in_file(moving)[1]
    first = tmp_path / "model.safetensors"
    again = saved(tiny_models.make("sd1"), tmp_path / "again.safetensors")
    with safetensors.safe_open(first, "pt") as kept:  # writing to the model wrote to no file
        assert all(torch.equal(kept.get_tensor(name), value) for name, value in again.state_dict().items())


def test_a_layer_that_is_patched_gets_memory(webui, moving, loaded):
    webui.shared.opts.data[ON_DISK] = True
    model = loaded("sd1")
    job(webui, model)
    job(webui, model)
    before = moving.status()["file_bytes"]
    weight = model.model.diffusion_model.middle_block.grow.weight
    with torch.no_grad():
        weight.mul_(0.5)
    patched = tiny_models.make("sd1")
    with torch.no_grad():
        patched.model.diffusion_model.middle_block.grow.weight.mul_(0.5)
    for _ in range(2):
        assert torch.equal(job(webui, model), tiny_models.picture(patched))
    assert 0 < moving.status()["file_bytes"] < before


def test_switched_off_it_is_memory_again(webui, moving, loaded):
    webui.shared.opts.data[ON_DISK] = True
    model = loaded("sd1")
    job(webui, model)
    webui.shared.opts.data[ENABLED] = False
    try:
        assert torch.equal(job(webui, model), expected("sd1"))
    finally:
        webui.shared.opts.data.pop(ENABLED)
    webui.shared.opts.data[ON_DISK] = False
    path = model.sd_checkpoint_info.filename
    with open(path, "r+b") as file:
        file.truncate(10)  # nobody reads it any more
    assert torch.equal(job(webui, model), expected("sd1"))
