"""Is the double true where previews are concerned, and is what `webui.preview` takes over what the real WebUI does there?

Read from the syntax tree, as in test_contract.py: the files concerned import the samplers.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from checkout import CHECKOUT, NEEDS_CHECKOUT, definitions, parameters, parse, tree_of

pytestmark = NEEDS_CHECKOUT


def function(module: str, name: str) -> ast.FunctionDef:
    return definitions(tree_of(module), ast.FunctionDef)[name]


def method(module: str, of: str, name: str) -> ast.FunctionDef:
    return definitions(definitions(tree_of(module), ast.ClassDef)[of], ast.FunctionDef)[name]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sd_samplers_common", "store_latent"),
        ("sd_vae_approx", "model"),
        ("sd_vae_approx", "cheap_approximation"),
        ("sd_vae_taesd", "decoder_model"),
    ],
)
def test_functions_of_the_double(webui, module, name):
    double = __import__(f"modules.{module}", fromlist=[name])
    assert parameters(function(module, name)) == list(inspect.signature(getattr(double, name)).parameters)


@pytest.mark.parametrize("name", ["do_set_current_image", "assign_current_image", "nextjob", "begin", "end"])
def test_methods_of_the_double(webui, name):
    assert parameters(method("shared_state", "State", name)) == list(inspect.signature(getattr(webui.shared_state.State, name)).parameters)


def test_methods_of_decoding_have_these_numbers():
    from lib_async_lowvram.webui.preview_decoders import APPROX_CHEAP, APPROX_NN, FULL, TAESD

    for node in tree_of("sd_samplers_common").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "approximation_indexes":
            assert ast.literal_eval(node.value) == {"Full": FULL, "Approx NN": APPROX_NN, "Approx cheap": APPROX_CHEAP, "TAESD": TAESD}
            return
    raise AssertionError("no approximation_indexes")


def test_when_a_preview_is_due():
    """What `_on_store_latent` repeats: the latent is stored first, then these conditions, and one picture is decoded inline."""
    body = function("sd_samplers_common", "store_latent").body
    assert ast.unparse(body[0]) == "state.current_latent = decoded"
    due, inline = body[1], body[1].body[0]
    assert len(body) == 2 and len(due.body) == 1
    assert ast.unparse(due.test) == (
        "opts.live_previews_enable and opts.show_progress_every_n_steps > 0"
        " and (shared.state.sampling_step % opts.show_progress_every_n_steps == 0)"
    )
    assert ast.unparse(inline) == (
        "if not shared.parallel_processing_allowed:\n    shared.state.assign_current_image(sample_to_image(decoded))"
    )


def test_latents_are_stored_by_these_only():
    """All of them ask the module for its `store_latent`, so a patched one is called; none decodes a preview by itself."""
    for path in (Path(CHECKOUT) / "modules").rglob("*.py"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("store_latent"):
                called = ast.unparse(node.func)
                assert called in ("sd_samplers_common.store_latent", "store_latent"), path.name
                if called == "store_latent":
                    assert path.name == "sd_samplers_common.py"


def test_pictures_are_asked_for_where_we_think():
    """Clients' requests decode nothing under `--lowvram`; the period -1 does, once per batch; beginning a job forgets the picture."""
    asked = ast.unparse(method("shared_state", "State", "set_current_image"))
    assert "if not shared.parallel_processing_allowed:\n        return" in asked
    nextjob = ast.unparse(method("shared_state", "State", "nextjob"))
    assert "show_progress_every_n_steps == -1:\n        self.do_set_current_image()" in nextjob
    begin = ast.unparse(method("shared_state", "State", "begin"))
    assert "self.current_image = None" in begin and "self.id_live_preview = 0" in begin
    assert "self.id_live_preview += 1" in ast.unparse(method("shared_state", "State", "assign_current_image"))
    do_set = ast.unparse(method("shared_state", "State", "do_set_current_image"))
    assert "if shared.opts.show_progress_grid:" in do_set
    assert "self.current_image_sampling_step = self.sampling_step" in do_set


def test_full_is_approximated_unless_allowed():
    source = ast.unparse(function("sd_samplers_common", "samples_to_images_tensor"))
    assert "not shared.opts.live_preview_allow_lowvram_full" in source
    assert "devices.without_autocast()" in source
    assert "model.decode_first_stage(sample.to(model.first_stage_model.dtype))" in source
    assert "x_sample * 2 - 1" in source


def test_casting_by_hand_leaves_a_trace_on_the_class():
    source = ast.unparse(function("devices", "manual_cast"))
    assert "module_type.org_forward = org_forward" in source
    assert "delattr(module_type, 'org_forward')" in source


def test_options_and_functions_we_read():
    options = (Path(CHECKOUT) / "modules" / "shared_options.py").read_text(encoding="utf-8")
    for name in (
        *("live_previews_enable", "show_progress_every_n_steps", "show_progress_type", "show_progress_grid"),
        *("live_preview_allow_lowvram_full", "live_preview_fast_interrupt"),
    ):
        assert f'"{name}": OptionInfo(' in options, name
    assert parameters(function("images", "image_grid"))[0] == "imgs"
    assert "parallel_processing_allowed" in (Path(CHECKOUT) / "modules" / "shared.py").read_text(encoding="utf-8")
