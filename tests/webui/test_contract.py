"""Is the double true? Its seams against the sources of a real WebUI, where SD_WEBUI_DIR names a checkout.

The WebUI is not imported: it would need a gigabyte of packages. Most is read from the syntax tree. Three of its files import
nothing but torch and `modules` siblings that the double has, so those run here, against the double: `lowvram.py`,
`patches.py` and `shared_state.py` - the real hooks, closures and jobs that the extension meets.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from checkout import CHECKOUT, NEEDS_CHECKOUT, definitions, parameters, parse, tree_of

from lib_async_lowvram.webui.stock import closure_of, harvest, is_stock_hook, vae_originals

pytestmark = NEEDS_CHECKOUT


def real_module(name: str):
    """One real file of the checkout, run in the place of the double's."""
    path = Path(CHECKOUT) / "modules" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"modules.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[f"modules.{name}"] = module
    setattr(sys.modules["modules"], name, module)
    return module


# -- the same names and signatures -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", ["lowvram", "patches", "sd_models", "devices", "launch_utils"])
def test_functions_of_the_double_exist_with_the_same_parameters(webui, module):
    real = definitions(tree_of(module), ast.FunctionDef)
    ours = {
        name: list(inspect.signature(function).parameters)
        for name, function in vars(getattr(webui, module)).items()
        if inspect.isfunction(function) and function.__module__ == f"modules.{module}"
    }
    own = {"load_beside", "use_loaded", "load_weights_in_place"}  # whole operations of the host, shortened for tests
    for name in sorted(set(ours) - own - {"load_model"}):
        assert name in real, f"modules.{module} has no {name}"
        assert parameters(real[name])[: len(ours[name])] == ours[name], name


@pytest.mark.parametrize(
    ("module", "class_name", "methods"),
    [
        ("shared_state", "State", {"begin": ["self", "job"], "end": ["self"], "nextjob": ["self"]}),
        ("upscaler", "Upscaler", {"upscale": ["self", "img", "scale", "selected_model"], "do_upscale": ["self", "img", "selected_model"]}),
        ("scripts", "Script", {"title": ["self"], "show": ["self", "is_img2img"], "process_before_every_sampling": ["self", "p"]}),
        ("options", "Options", {"add_option": ["self", "key", "info"], "set": ["self", "key", "value", "is_api", "run_callbacks"]}),
        ("options", "OptionInfo", {"info": ["self", "info"], "needs_restart": ["self"]}),
    ],
)
def test_methods_of_the_double_exist(webui, module, class_name, methods):
    real = definitions(definitions(tree_of(module), ast.ClassDef)[class_name], ast.FunctionDef)
    for name, expected in methods.items():
        assert parameters(real[name]) == expected
        ours = getattr(getattr(getattr(webui, module), class_name), name)
        assert [name for name, p in inspect.signature(ours).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == expected


def test_callbacks_we_register(webui):
    real = definitions(tree_of("script_callbacks"), ast.FunctionDef)
    for name in ("on_app_started", "on_ui_settings", "on_script_unloaded", "on_cfg_denoiser"):
        assert name in real
        assert parameters(real[name]) == ["callback"]


def test_option_parameters_we_pass():
    init = definitions(definitions(tree_of("options"), ast.ClassDef)["OptionInfo"], ast.FunctionDef)["__init__"]
    assert parameters(init)[1:5] == ["default", "label", "component", "component_args"]
    assert {"section", "category_id"} <= set(parameters(init))
    categories = (Path(CHECKOUT) / "modules" / "shared_options.py").read_text(encoding="utf-8")
    assert 'register_category("sd"' in categories
    assert "OptionInfo" in (Path(CHECKOUT) / "modules" / "shared.py").read_text(encoding="utf-8")


def test_model_data_has_what_we_read():
    init = definitions(definitions(tree_of("sd_models"), ast.ClassDef)["SdModelData"], ast.FunctionDef)["__init__"]
    attributes = {node.attr for node in ast.walk(init) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    assert {"sd_model", "loaded_sd_models"} <= attributes


def test_version_is_known(monkeypatch, webui):
    from lib_async_lowvram.webui.host import DEVICE_VARIABLE, SIMULATED, Host, detect

    first = next(line for line in (Path(CHECKOUT) / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.strip())
    webui.launch_utils.tag = first.replace("## ", "").strip()
    assert isinstance(detect({DEVICE_VARIABLE: SIMULATED}), Host)


# -- called so that a patch is seen --------------------------------------------------------------------------------------
def test_nothing_we_patch_is_bound_by_name_elsewhere():
    """`from modules.lowvram import send_everything_to_cpu` would keep the original whatever we patch."""
    patched = {
        "modules.lowvram": {"setup_for_low_vram", "send_everything_to_cpu", "module_in_gpu"},
        "modules.devices": {"torch_gc"},
        "modules.sd_models": {"send_model_to_trash"},
        "modules.sd_samplers_common": {"store_latent"},
    }
    for folder in ("modules", "extensions-builtin", "scripts"):
        for path in (Path(CHECKOUT) / folder).rglob("*.py"):
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.ImportFrom) and node.module in patched:
                    bound = {alias.name for alias in node.names} & patched[node.module]
                    assert not bound, f"{path.name} binds {bound}"


def test_every_way_of_throwing_a_model_away_goes_through_one_function():
    calls = [
        node
        for node in ast.walk(tree_of("sd_models"))
        if isinstance(node, ast.Call) and any(isinstance(word.value, ast.Constant) and word.value.value == "meta" for word in node.keywords)
    ]
    assert len(calls) == 1
    trash = definitions(tree_of("sd_models"), ast.FunctionDef)["send_model_to_trash"]
    assert trash.lineno <= calls[0].lineno <= trash.end_lineno


def test_a_job_that_raises_resets_the_state_and_collects():
    """How we learn of it: `State.end` is not called, but `job` and `job_count` are reset and `torch_gc` follows."""
    tree = tree_of("call_queue")
    functions = definitions(tree, ast.FunctionDef)
    source = ast.unparse(functions["wrap_gradio_call"])
    assert "shared.state.job = ''" in source and "shared.state.job_count = 0" in source
    assert "devices.torch_gc()" in ast.unparse(functions["wrap_gradio_call_no_job"])


def test_every_upscaler_goes_through_one_method():
    """We patch `Upscaler.upscale`: nobody overrides it, and nobody else calls what it calls."""
    for folder in ("modules", "extensions-builtin", "scripts"):
        for path in (Path(CHECKOUT) / folder).rglob("*.py"):
            tree = parse(path)
            for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
                bases = [ast.unparse(base).split(".")[-1] for base in kind.bases]
                assert "Upscaler" not in bases or "upscale" not in definitions(kind, ast.FunctionDef), f"{path.name}: {kind.name}"
            if path.name != "upscaler.py":
                calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
                assert "do_upscale" not in [call.attr for call in calls], path.name
    hires = ast.unparse(definitions(tree_of("processing"), ast.FunctionDef)["sample_hr_pass"])
    assert "images.resize_image(" in hires
    assert ".scaler.upscale(" in ast.unparse(tree_of("images"))


def test_upscalers_are_known_before_scripts_are_imported():
    source = ast.unparse(definitions(tree_of("initialize"), ast.FunctionDef)["initialize_rest"])
    assert source.index("import shared, upscaler, scripts") < source.index("scripts.load_scripts()")


def test_sampling_is_announced_where_we_prepare():
    source = ast.unparse(tree_of("processing"))
    assert source.count("scripts.process_before_every_sampling(") == 3


# -- the real files, run against the double ------------------------------------------------------------------------------
def layout(model) -> dict:
    """What `--lowvram` left on a model, in words."""
    found = harvest(model)
    names = {id(module): name for name, module in model.named_modules()}
    return {
        "hooked": [(names[id(module)], hook.__name__, hook.__module__) for module, _, hook in found.hooked],
        "parents": {names[id(module)]: names[id(parent)] for module, parent in found.parents.items()},
        "vae": {name: (wrap.__name__, wrap.__module__) for name, (wrap, _) in found.vae_wraps.items()},
        "vae closures": {name: sorted(closure_of(wrap)) for name, (wrap, _) in found.vae_wraps.items()},
        "fields": {name: getattr(model, name, "absent") for name in ("depth_model", "embedder", "lowvram")},
    }


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_real_stock_leaves_what_the_double_leaves(webui, kind):
    one, other = tiny_models.make(kind), tiny_models.make(kind)
    webui.lowvram.setup_for_low_vram(one, False)
    real = real_module("lowvram")
    real.setup_for_low_vram(other, False)
    assert layout(other) == layout(one)
    assert len(layout(other)["hooked"]) > 8
    assert set(layout(other)["vae"]) == {"encode", "decode"}


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_real_originals_are_found_before_and_after(webui, kind):
    real = real_module("lowvram")
    model = tiny_models.make(kind)
    before = vae_originals(model)
    real.setup_for_low_vram(model, False)
    assert {name: original for name, (_, original) in harvest(model).vae_wraps.items()} == before
    assert all(is_stock_hook(function) for _, _, function in harvest(model).hooked)


def test_real_stock_moves_as_the_double_moves(webui):
    """Who is told to move where, in one picture."""

    def trace(lowvram):
        model = tiny_models.make("sd1")
        lowvram.setup_for_low_vram(model, False)
        moves = []
        names = {id(module): name for name, module in model.named_modules()}
        plain = torch.nn.Module.to

        def to(module, *args, **kwargs):
            moves.append((names.get(id(module)), str(args[0])))
            return plain(module, *args, **kwargs)

        torch.nn.Module.to = to
        try:
            tiny_models.picture(model, steps=2)
            lowvram.send_everything_to_cpu()
        finally:
            torch.nn.Module.to = plain
        assert lowvram.module_in_gpu is None
        return moves

    ours = trace(webui.lowvram)
    assert trace(real_module("lowvram")) == ours
    assert len(ours) > 20


def test_real_stock_under_the_integration(webui, request):
    """The whole integration over the real `lowvram.py`, `patches.py` and `shared_state.py`."""
    webui.patches = real_module("patches")
    webui.lowvram = real_module("lowvram")
    webui.shared_state = real_module("shared_state")
    sys.modules.pop("modules.sd_models")
    webui.sd_models = importlib.import_module("modules.sd_models")
    webui.shared.state = webui.shared_state.State()
    recording = request.getfixturevalue("recording")
    for kind in ("sd1", "sd2", "sdxl"):
        model = webui.sd_models.load_model(lambda kind=kind: tiny_models.make(kind))
        assert recording.mover.networks.keys() == {"unet", "text", "vae_encode", "vae_decode"}
        webui.shared.state.begin("job")
        assert torch.equal(tiny_models.picture(model), tiny_models.picture(tiny_models.make(kind)))
        webui.shared.state.end()
    before = webui.patches.originals["async_lowvram"].copy()
    recording.integration.close()
    assert all(getattr(owner, field) is original for (owner, field), original in before.items())
    assert all(is_stock_hook(fn) for module in model.modules() for fn in module._forward_pre_hooks.values())
    assert webui.lowvram.module_in_gpu is None


def test_real_patches_refuse_a_second_patch_as_the_double_does(webui):
    for patches in (webui.patches, real_module("patches")):
        owner = importlib.import_module("modules.launch_utils")
        stock = owner.git_tag
        assert patches.patch("key", owner, "git_tag", len) is stock
        assert patches.original("key", owner, "git_tag") is stock
        with pytest.raises(RuntimeError):
            patches.patch("key", owner, "git_tag", len)
        patches.undo("key", owner, "git_tag")
        assert owner.git_tag is stock
        assert patches.original("key", owner, "git_tag") is None
        with pytest.raises(RuntimeError):
            patches.undo("key", owner, "git_tag")
