"""The seam of the retry, and what it believes of LoRA, against the sources of a real WebUI, where SD_WEBUI_DIR names a checkout."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from checkout import CHECKOUT, NEEDS_CHECKOUT, definitions, parameters, parse, tree_of

from lib_async_lowvram.webui.lora import MODULE
from lib_async_lowvram.webui.memory_errors import DOGGETTX
from lib_async_lowvram.webui.retry import METHOD

pytestmark = NEEDS_CHECKOUT
REPOSITORIES = Path(CHECKOUT) / "repositories"


def calls_of(tree: ast.AST, name: str) -> list[ast.Call]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == name]


@pytest.mark.parametrize(
    "path",
    ["modules/sd_samplers_timesteps.py", "modules/sd_samplers_lcm.py", "repositories/k-diffusion/k_diffusion/external.py"],
)
def test_samplers_look_the_method_up_at_every_call(path):
    """Whoever keeps `model.apply_model` would keep what it was before the patch."""
    file = Path(CHECKOUT) / path
    if not file.is_file():
        pytest.skip(f"this checkout has no {path}")
    tree = parse(file)
    called = {id(call.func) for call in calls_of(tree, METHOD)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == METHOD]
    assert called and all(id(node) in called for node in found)


def test_each_kind_of_model_has_the_method_on_its_class():
    xl = [ast.unparse(node) for node in ast.walk(tree_of("sd_models_xl")) if isinstance(node, ast.Assign)]
    assert f"sgm.models.diffusion.DiffusionEngine.{METHOD} = {METHOD}" in xl
    assert parameters(definitions(tree_of("sd_models_xl"))[METHOD]) == ["self", "x", "t", "cond"]
    hijacked = (Path(CHECKOUT) / "modules" / "sd_hijack_unet.py").read_text(encoding="utf-8")
    assert f"'ldm.models.diffusion.ddpm.LatentDiffusion.{METHOD}'" in hijacked
    stability = REPOSITORIES / "stable-diffusion-stability-ai" / "ldm" / "models" / "diffusion" / "ddpm.py"
    for source in (stability, Path(CHECKOUT) / "modules" / "models" / "diffusion" / "ddpm_edit.py"):
        if source.is_file():
            method = definitions(definitions(parse(source))["LatentDiffusion"])[METHOD]
            assert parameters(method)[:4] == ["self", "x_noisy", "t", "cond"]
            assert "self.model(x_noisy, t, **cond)" in ast.unparse(method)


def test_what_doggettx_raises_instead():
    raised = [ast.unparse(node) for node in ast.walk(tree_of("sd_hijack_optimizations")) if isinstance(node, ast.Raise)]
    assert any(text.startswith(f"raise RuntimeError(f'{DOGGETTX}") for text in raised)


def lora_functions() -> dict[str, ast.AST]:
    file = Path(CHECKOUT) / "extensions-builtin" / "Lora" / f"{MODULE}.py"
    return definitions(parse(file), ast.FunctionDef)


def test_a_layers_names_are_set_last_and_only_then():
    """So one that an error left half patched is restored from its backup and patched anew."""
    apply = lora_functions()["network_apply_weights"]
    last = apply.body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "current_names != wanted_names"
    assert ast.unparse(last.body[0]) == "network_restore_weights_from_backup(self)"
    assert ast.unparse(last.body[-1]) == "self.network_current_names = wanted_names"
    assert sum(ast.unparse(node) == "self.network_current_names = wanted_names" for node in ast.walk(apply)) == 1


def test_an_error_in_a_layer_is_counted_where_it_is_handled():
    apply = lora_functions()["network_apply_weights"]
    counted = 0
    for handler in (node for node in ast.walk(apply) if isinstance(node, ast.ExceptHandler)):
        assert ast.unparse(handler.type) == "RuntimeError"
        counted += any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "extra_network_lora.errors[net.name]" for node in handler.body
        )
    assert counted == 3
    loras = parse(Path(CHECKOUT) / "extensions-builtin" / "Lora" / "extra_networks_lora.py")
    init = definitions(definitions(loras)["ExtraNetworkLora"])["__init__"]
    assert "self.errors = {}" in ast.unparse(init)


def test_generators_that_may_be_drawn_from_in_a_pass():
    assert "nv_rng = rng_philox.Generator(seed)" in ast.unparse(definitions(tree_of("rng"))["manual_seed"])
    philox = definitions(definitions(tree_of("rng_philox"))["Generator"])["__init__"]
    assert {"self.seed = seed", "self.offset = 0"} <= {ast.unparse(node) for node in philox.body}
    tiles = parse(Path(CHECKOUT) / "extensions-builtin" / "hypertile" / "hypertile.py")
    assert "RNG_INSTANCE = random.Random()" in [ast.unparse(node) for node in tiles.body]
