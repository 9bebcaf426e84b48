"""Small seeded files for the end-to-end tests of the host's features: what a user would have downloaded.

    python tests/webui/make_fixtures.py --models FOLDER    the server's --models-dir, before it starts (upscalers are listed once)

Everything else (`write_hypernetwork` ...) is written while servers run, by the tests, into the folders the servers name.
The same bytes every time: both servers must have the same files, and a second run must not change hashes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

UPSCALER = "feat-esrgan"
UPSCALER_SCALE = 4
HYPERNETWORK = "feat-hypernet"
EMBEDDING = "feat-embedding"
LORA = "feat-lora"
NAN_VAE = "feat-nan.vae.safetensors"
LEGACY = {"_use_new_zipfile_serialization": False}
"""For `torch.save`: a newer torch puts files into its archives that the host refuses."""


def _random(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) * scale


def _save_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The format in a dozen lines: neither project nor test environment has the package."""
    header, place = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        kind = {torch.float32: "F32", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().numpy().tobytes())


class Checkpoint:
    """A safetensors file, read one tensor at a time."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        with self._path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            self._header = json.loads(file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._header if name.startswith(prefix)]

    def shape(self, name: str) -> list[int]:
        return self._header[name]["shape"]

    def tensor(self, name: str) -> torch.Tensor:
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        with self._path.open("rb") as file:
            file.seek(self._start + begin)
            data = bytearray(file.read(end - begin))
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}[entry["dtype"]]
        return torch.frombuffer(data, dtype=dtype).reshape(entry["shape"])


def read_torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """Of the bits of all of them."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_upscaler(folder: Path) -> Path:
    """An ESRGAN of one block over eight channels, in the names spandrel knows, four times as wide and high."""
    generator = torch.Generator().manual_seed(11)
    width, growth, state = 8, 32, {}  # the growth is fixed in spandrel

    def conv(name: str, into: int, out: int, scale: float = 0.2) -> None:
        state[f"{name}.weight"] = _random(generator, out, into, 3, 3, scale=scale / into**0.5)
        state[f"{name}.bias"] = _random(generator, out, scale=0.05)

    conv("model.0", 3, width, scale=1.0)
    for block in (1, 2, 3):
        for step in range(1, 6):
            conv(f"model.1.sub.0.RDB{block}.conv{step}.0", width + (step - 1) * growth, growth if step < 5 else width)
    conv("model.1.sub.1", width, width)
    for place in (3, 6, 8):
        conv(f"model.{place}", width, width, scale=0.6)
    conv("model.10", width, 3, scale=1.0)
    state["model.10.bias"] += 0.5
    path = folder / "ESRGAN" / f"{UPSCALER}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path, **LEGACY)
    return path


def write_hypernetwork(folder: Path, sizes: tuple[int, ...]) -> Path:
    """Two layers for the keys and two for the values of every attention of one of these widths."""
    generator = torch.Generator().manual_seed(12)
    state: dict = {
        "step": 0,
        "name": HYPERNETWORK,
        "layer_structure": [1, 2, 1],
        "activation_func": "relu",
        "is_layer_norm": False,
        "weight_initialization": "Normal",
        "activate_output": False,
        "use_dropout": False,
        "dropout_structure": [0, 0, 0],
        "last_layer_dropout": False,
    }
    for size in sizes:
        state[size] = tuple(
            {
                "linear.0.weight": _random(generator, 2 * size, size, scale=0.5 / size**0.5),
                "linear.0.bias": _random(generator, 2 * size, scale=0.02),
                "linear.2.weight": _random(generator, size, 2 * size, scale=0.5 / size**0.5),
                "linear.2.bias": _random(generator, size, scale=0.02),
            }
            for _ in range(2)
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{HYPERNETWORK}.pt"
    torch.save(state, path, **LEGACY)
    return path


def write_embedding(folder: Path, width: int = 768, vectors: int = 3) -> Path:
    generator = torch.Generator().manual_seed(13)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{EMBEDDING}.pt"
    torch.save({"string_to_param": {"*": _random(generator, vectors, width, scale=0.05)}, "name": EMBEDDING, "step": 1}, path, **LEGACY)
    return path


def write_lora(folder: Path, checkpoint: Checkpoint, rank: int = 4) -> Path:
    """Rank 4, on every second linear layer of the UNet's attentions and of the text encoder."""
    generator = torch.Generator().manual_seed(14)
    tensors = {}
    unet, text = "model.diffusion_model.", "cond_stage_model.transformer.text_model."
    wanted = [name for name in checkpoint.names(unet) if name.endswith((".to_q.weight", ".to_v.weight", ".to_out.0.weight"))]
    wanted += [name for name in checkpoint.names(text) if name.endswith((".q_proj.weight", ".fc1.weight"))]
    for name in sorted(wanted):
        out, into = checkpoint.shape(name)
        layer = name.removesuffix(".weight")
        short = layer.removeprefix(unet).removeprefix(text).replace(".", "_")
        key = f"lora_unet_{short}" if layer.startswith(unet) else f"lora_te_text_model_{short}"
        tensors[f"{key}.lora_down.weight"] = _random(generator, rank, into, scale=1 / into**0.5)
        tensors[f"{key}.lora_up.weight"] = _random(generator, out, rank, scale=0.3 / rank**0.5)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    path = folder / f"{LORA}.safetensors"
    _save_safetensors(path, tensors)
    return path


def write_nan_vae(folder: Path, checkpoint: Checkpoint) -> Path:
    """The checkpoint's VAE, changed so that decoding overflows in float32 and not in bfloat16.

    Two channels between `post_quant_conv` and `decoder.conv_in` hold the constant b and are taken with the weights w and -w.
    b * w is just above what either format can hold; rounded to bfloat16 both become smaller, and their product fits.
    """
    prefix = "first_stage_model."
    tensors = {name.removeprefix(prefix): checkpoint.tensor(name).float().clone() for name in checkpoint.names(prefix)}
    bias, weight = 2.0**64 * (1 + 0.99 * 2.0**-8), 2.0**64 * (1 - 2.0**-8 + 0.9 * 2.0**-9)
    for channel in (2, 3):
        tensors["post_quant_conv.weight"][channel] = 0.0
        tensors["post_quant_conv.bias"][channel] = bias
        tensors["decoder.conv_in.weight"][:, channel] = 0.0
    tensors["decoder.conv_in.weight"][0, 2, 1, 1] = weight
    tensors["decoder.conv_in.weight"][0, 3, 1, 1] = -weight
    path = folder / NAN_VAE
    _save_safetensors(path, tensors)
    return path


def write_training_data(folder: Path, size: int = 64) -> Path:
    """One small picture: with one, nothing depends on the order in which the host's unseeded shuffle takes them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (size, size))
    picture.putdata([(4 * x % 256, 4 * y % 256, (x * y) % 256) for y in range(size) for x in range(size)])
    picture.save(folder / "one.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder the servers get as --models-dir")
    print(write_upscaler(parser.parse_args().models))


if __name__ == "__main__":
    main()
