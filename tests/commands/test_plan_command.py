"""The `plan` command on files that are all header: exact shapes under every set of names, execution order, what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib_async_lowvram.__main__ import main
from lib_async_lowvram.bench.shapes import sd15_shape, sdxl_shape
from lib_async_lowvram.bench.unet import UNet
from lib_async_lowvram.commands.plan_figures import Device, leaf_bytes, leaf_seconds, rate_for, stock_seconds, workload
from lib_async_lowvram.commands.unet_names import NoUnet
from lib_async_lowvram.commands.unet_walk import Unet, sum_flops, walk
from lib_async_lowvram.safetensors_header import read_header
from tests.commands import headers

# Leaves, fp16 bytes and FLOPs of one pass with two images: the totals of `unet.py` in the design's folder plan_reference, which
# counts them from the architectures' figures; the bytes are twice the published parameter counts (859,520,964; 2,567,463,684).
REFERENCE = {
    "sd15": (sd15_shape(), 512, 391, 1_719_041_928, 1_607_822_213_120),
    "sdxl": (sdxl_shape(), 1024, 1050, 5_134_927_368, 13_529_980_600_320),
}
NAMINGS = {"ldm": headers.ldm, "bench": headers.bench, "diffusers": headers.diffusers}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("headers")
    return {
        (kind, naming): headers.write(folder / f"{kind}-{naming}.safetensors", make(shape))
        for kind, (shape, *_) in REFERENCE.items()
        for naming, make in NAMINGS.items()
    }


def unet(path: Path, pixels: int) -> Unet:
    return walk(read_header(path), pixels, pixels)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("kind", REFERENCE)
def test_bytes_and_flops_are_the_reference_s(files, kind, naming):
    _, pixels, leaves, nbytes, flops = REFERENCE[kind]
    found = unet(files[kind, naming], pixels)
    assert len(found.leaves) == leaves and all(leaf.fires for leaf in found.leaves)
    assert sum(leaf_bytes(leaf, half=True) for leaf in found.leaves) == nbytes
    assert 2 * sum_flops(found.leaves) == flops


@pytest.mark.parametrize("kind", REFERENCE)
def test_every_naming_gives_the_same_steps(files, kind):
    """Diffusers runs the same network: leaf by leaf, in the same order."""
    pixels = REFERENCE[kind][1]
    one, *others = ([(leaf.tensors, leaf.flops, leaf.attention_flops) for leaf in unet(files[kind, n], pixels).leaves] for n in NAMINGS)
    for other in others:
        assert other == one


@pytest.mark.parametrize("shape", [sd15_shape(16), sdxl_shape(16)], ids=["sd15", "sdxl"])
def test_the_order_is_that_in_which_the_model_fires(tmp_path, shape):
    model = UNet(shape).eval()
    fired: list[str] = []
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda module, args, name=name: fired.append(name))
    inputs = [torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 77, shape.context)]
    with torch.no_grad():
        model(*inputs, *([torch.randn(1, shape.label)] if shape.label else []))
    path = headers.write(tmp_path / "x.safetensors", headers.bench(shape))
    assert [leaf.name for leaf in unet(path, 64).leaves] == fired


def test_sizes_that_do_not_halve_evenly(files):
    """520 pixels are 65 positions: 33, 17 and 9 below; on the way up the WebUI takes the skip connection's size."""
    leaves = {leaf.name: leaf for leaf in unet(files["sd15", "ldm"], 520).leaves}
    # 2 x 3 x 3 x 1280 x 1280 x 9 x 9
    assert leaves["middle_block.0.out_layers.3"].flops == 2 * 9 * 1280 * 1280 * 81
    assert leaves["output_blocks.11.0.out_layers.3"].flops == 2 * 9 * 320 * 320 * 65 * 65


def test_an_attention_belongs_to_its_value_layer(files):
    leaves = {leaf.name: leaf for leaf in unet(files["sd15", "ldm"], 512).leaves}
    block = "input_blocks.1.1.transformer_blocks.0"
    assert leaves[f"{block}.attn1.to_v"].attention_flops == 4 * 4096 * 4096 * 320
    assert leaves[f"{block}.attn2.to_v"].attention_flops == 4 * 4096 * 77 * 320
    assert leaves[f"{block}.attn1.to_out.0"].attention_flops == 0
    assert [name for name, leaf in leaves.items() if not leaf.block] == ["out.0", "out.2"]


def test_a_whole_checkpoint(tmp_path):
    """The UNet is found among text encoder, VAE, averages and a ControlNet's blocks; its types are those on the device."""
    tensors = {
        "first_stage_model.encoder.conv_in.weight": ("F32", (8, 3, 3, 3)),
        "model_ema.decay": ("F32", ()),
        **headers.ldm(sd15_shape(16), "F32", "control_model."),
        **headers.ldm(sd15_shape(16), "F32"),
        "cond_stage_model.x.weight": ("F16", (4, 4)),
    }
    found = unet(headers.write(tmp_path / "x.safetensors", tensors), 512)
    assert found.prefix == "model.diffusion_model."
    parameters = sum(tensor.elements for leaf in found.leaves for tensor in leaf.tensors)
    assert sum(leaf_bytes(leaf, half=True) for leaf in found.leaves) == 2 * parameters
    assert sum(leaf_bytes(leaf, half=False) for leaf in found.leaves) == 4 * parameters
    assert sum(leaf_bytes(leaf, half=True, grain=512) for leaf in found.leaves) % 512 == 0


def test_unknown_layers_are_counted_and_told(tmp_path, capsys):
    tensors = {**headers.ldm(sd15_shape(16)), "model.diffusion_model.adapter.proj.weight": ("F16", (1024, 1024))}
    path = headers.write(tmp_path / "x.safetensors", tensors)
    *known, last = unet(path, 512).leaves
    assert (last.name, last.fires, last.flops) == ("adapter.proj", False, 0.0)
    load = workload(unet(path, 512), Device(1e9, 1e12, None, 2, True))
    assert len(load.steps) == len(known) and len(load.nbytes) == len(known) + 1
    assert main(["plan", "--checkpoint", str(path), "--budget", "50%"]) == 0
    assert "note: 1 layers (2 MB) are of no kind known here" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [1e-4, 0.02, 3.0])
def test_seconds_add_up_to_what_was_measured(files, seconds):
    found = unet(files["sd15", "ldm"], 512)
    load = workload(found, Device(1e9, None, seconds, 2, True))
    assert load.compute_seconds == pytest.approx(seconds, rel=1e-9)
    rate = rate_for(found.leaves, 2, seconds)
    if rate < float("inf"):
        assert sum(leaf_seconds(found.leaves, 2, rate)) == pytest.approx(seconds, rel=1e-9)


def test_stock_moves_all_blocks_both_ways(files):
    found = unet(files["sdxl", "ldm"], 1024)
    device = Device(1e9, 1e12, None, 2, True)
    load = workload(found, device)
    kept = [leaf for leaf in found.leaves if leaf.name.startswith(("out.", "label_emb."))]
    moved = REFERENCE["sdxl"][3] - sum(leaf_bytes(leaf, True) for leaf in kept)
    assert stock_seconds(found, device, load) == pytest.approx(load.compute_seconds + 2 * moved / 1e9)
    assert load.must_reside == {number for number, leaf in enumerate(found.leaves) if leaf in kept}


def test_the_command(files, tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--checkpoint", str(files["sd15", "ldm"]), "--budget", "25%,600,100%", "--tflops", "9.3", "--bandwidth", "12"]
    assert main(["plan", *arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert "ASSUMPTION" not in printed.out and "stock --lowvram" in printed.out and not printed.err
    figures = json.loads(out.read_text())
    assert figures["schema"] == 1 and figures["unet"]["flops_per_pass"] == REFERENCE["sd15"][4]
    quarter, fixed, whole = figures["budgets"]
    assert fixed["budget_bytes"] == 600 << 20 and whole["streamed_bytes_per_pass"] == 0 and whole["efficiency"] == pytest.approx(1)
    for row in (quarter, fixed, whole):
        assert row["resident_bytes"] + row["ring_bytes"] <= row["budget_bytes"]
        assert row["seconds_per_pass"] >= row["floor_seconds"] * (1 - 1e-9) >= row["limit_seconds"] * (1 - 2e-9)
        assert row["its"] == pytest.approx(1 / row["seconds_per_pass"])
    assert quarter["seconds_per_pass"] >= whole["seconds_per_pass"] == pytest.approx(figures["compute_seconds_per_pass"])


def test_what_is_assumed_is_told(files, capsys):
    assert main(["plan", "--checkpoint", str(files["sd15", "ldm"]), "--budget", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("AN ASSUMPTION") == 2 and "note: budget raised" in printed


def test_plan_imports_no_torch(files):
    """It runs where there is none."""
    code = (
        "import sys; from lib_async_lowvram.__main__ import main\n"
        f"main(['plan', '--checkpoint', {str(files['sd15', 'ldm'])!r}])\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'tqdm', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(("kind", "counted"), [("sd15", 1_606_546_882_560), ("sdxl", 13_522_472_796_160)])
def test_flops_are_those_that_torch_counts(files, kind, counted):
    """torch's own counter leaves norms out. The figures are its counts of LDM's own code, as the WebUI 1.10.1 brings it; our model
    gives the same."""
    shape, pixels, *_ = REFERENCE[kind]
    leaves = unet(files[kind, "ldm"], pixels).leaves
    assert 2 * sum_flops(leaf for leaf in leaves if any(len(tensor.shape) > 1 for tensor in leaf.tensors)) == counted
    with torch.device("meta"):
        model = UNet(shape).eval()
        inputs = [torch.empty(2, 4, pixels // 8, pixels // 8), torch.empty(2), torch.empty(2, 77, shape.context)]
        inputs += [torch.empty(2, shape.label)] if shape.label else []
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    # Not every version of torch has a formula for the attention it chooses on the meta device.
    attention = 2 * sum(leaf.attention_flops for leaf in leaves)
    assert counter.get_total_flops() in (counted, counted - attention)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--checkpoint", "x", "--check"],
        *(["--checkpoint", "x", "--budget", budget] for budget in ("", "0", "-1", "nan", "inf", "1e99", "5%%", "5,,6", "a", "%")),
        *(["--checkpoint", "x", *more] for more in (["--bandwidth", "0"], ["--tflops", "x"], ["--compute-ms", "-1"], ["--dtype", "fp7"])),
        *(["--checkpoint", "x", *more] for more in (["--width", "0"], ["--height", "9" * 30], ["--batch", "1.5"], ["--lookahead", "-1"])),
        ["--checkpoint", "x", "--tflops", "1", "--compute-ms", "1"],
    ],
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2


def test_a_file_that_cannot_be_written_is_told_first(tmp_path, capsys):
    assert main(["plan", "--checkpoint", str(tmp_path / "missing"), "--json", str(tmp_path / "no" / "where.json")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_absurd_sizes_do_not_break_it(tmp_path, capsys):
    """Weights without elements, pictures as large as can be asked for, budgets of nothing and of more than there is."""
    empty = {name: (dtype, (0, *shape[1:])) for name, (dtype, shape) in headers.ldm(sd15_shape(16)).items()}
    path = headers.write(tmp_path / "empty.safetensors", empty)
    assert main(["plan", "--checkpoint", str(path), "--compute-ms", "5", "--budget", "1,50%"]) == 0
    path = headers.write(tmp_path / "x.safetensors", headers.ldm(sd15_shape(16)))
    large = ["--width", "1048576", "--height", "1048576", "--batch", "1048576"]
    assert main(["plan", "--checkpoint", str(path), *large, "--budget", "0.0001,900000%", "--bandwidth", "1e-9"]) == 0
    assert main(["plan", "--checkpoint", str(path), "--width", "1", "--height", "1", "--bandwidth", "1e9", "--tflops", "1e9"]) == 0
    many = {f"model.diffusion_model.x.{number}.weight": ("I8", (1,)) for number in range(20_001)}
    path = headers.write(tmp_path / "many.safetensors", {**headers.ldm(sd15_shape(16)), **many})
    capsys.readouterr()
    assert main(["plan", "--checkpoint", str(path)]) == 2
    assert "more than any known one" in capsys.readouterr().err


def without(tensors: headers.Tensors, part: str) -> headers.Tensors:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "no tensors at all"),
        ({"lora_unet_down.lora_up.weight": ("F16", (2, 2))}, "a LoRA"),
        (headers.ldm(sd15_shape(16), prefix="control_model."), None),
        (without(headers.ldm(sd15_shape(16), prefix="control_model."), "output_blocks"), "a ControlNet"),
        ({"model.diffusion_model.double_blocks.0.weight": ("F16", (2, 2))}, "Flux"),
        ({"some.weight": ("F16", (2, 2))}, "such as some.weight"),
        (without(headers.ldm(sd15_shape(16)), "input_blocks.3.0"), "input_blocks are not numbered without gaps"),
        (without(headers.ldm(sd15_shape(16)), "input_blocks.1.0.in_layers.0"), "lacks model.diffusion_model.input_blocks.1.0.in_layers.0"),
        (without(headers.ldm(sd15_shape(16)), "middle_block.0.in_layers"), "unknown names"),
        (without(headers.ldm(sd15_shape(16)), "attn2.to_k"), "lacks"),
        (without(headers.ldm(sd15_shape(16)), "transformer_blocks"), "has no input_blocks.1.1.transformer_blocks"),
        (without(headers.diffusers(sd15_shape(16)), "mid_block.resnets"), "has no mid_block.resnets"),
        ({**headers.ldm(sd15_shape(16)), "model.diffusion_model.out.2.weight": ("F16", (7,))}, "dimensions were expected"),
        ({**headers.ldm(sd15_shape(16)), "model.diffusion_model.output_blocks.12.0.conv.weight": ("F16", (2, 2, 3, 3))}, "more output"),
        ({**headers.ldm(sd15_shape(16)), "model.diffusion_model.input_blocks.12.0.weird.weight": ("F16", (2,))}, "of an unknown kind"),
    ],
)
def test_what_is_no_unet(tmp_path, tensors, says, capsys):
    path = headers.write(tmp_path / "x.safetensors", tensors)
    if says is None:  # complete, whatever its name
        assert walk(read_header(path), 64, 64).prefix == "control_model."
        return
    with pytest.raises(NoUnet, match=says.replace("(", r"\(")):
        walk(read_header(path), 64, 64)
    assert main(["plan", "--checkpoint", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and says in error
