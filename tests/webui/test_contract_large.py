"""The seam of large pictures against the sources of a real WebUI, where SD_WEBUI_DIR names a checkout: what `large_denoise` and
`large_prompts` believe of the denoiser, the refiner's switch, the prompts' schedules and the processing object."""

from __future__ import annotations

import ast

import pytest
from checkout import NEEDS_CHECKOUT, definitions, parameters, tree_of

pytestmark = NEEDS_CHECKOUT


def forward() -> ast.FunctionDef:
    return definitions(definitions(tree_of("sd_samplers_cfg_denoiser"))["CFGDenoiser"])["forward"]


def assigned(function: ast.AST, name: str) -> list[str]:
    """What is assigned to a plain name, in order of appearance."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name]
    return [ast.unparse(node.value) for node in sorted(nodes, key=lambda node: node.lineno)]


def calls(function: ast.AST, name: str) -> list[ast.Call]:
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    return sorted(found, key=lambda node: node.lineno)


def test_one_step_is_one_call_of_the_denoiser():
    assert parameters(forward()) == ["self", "x", "sigma", "uncond", "cond", "cond_scale", "s_min_uncond", "image_cond"]
    for module in ("sd_samplers_kdiffusion", "sd_samplers_timesteps"):
        for name, found in definitions(tree_of(module), ast.ClassDef).items():
            if any("CFGDenoiser" in ast.unparse(base) for base in found.bases):
                assert "forward" not in {node.name for node in found.body if isinstance(node, ast.FunctionDef)}, name


def test_the_refiner_comes_in_at_the_start_of_a_step_through_its_module():
    """So a function put in that module's place is called; and whoever knew the model before has to look again."""
    [call] = calls(forward(), "sd_samplers_common.apply_refiner")
    assert [ast.unparse(each) for each in call.args] == ["self", "sigma"]
    assert call.lineno < min(each.lineno for each in calls(forward(), "self.inner_model"))
    refiner = definitions(tree_of("sd_samplers_common"))["apply_refiner"]
    returned = [node.value.value for node in ast.walk(refiner) if isinstance(node, ast.Return)]
    assert set(returned) == {True, False} and returned.count(True) == 1


def test_rows_are_conditions_picture_by_picture_and_then_unconditional_ones():
    stacked = "torch.cat([torch.stack([x[i] for _ in range(n)]) for i, n in enumerate(repeats)]"
    stacked = ast.unparse(ast.parse(stacked + ")")).removesuffix(")")  # which writes a pair with or without brackets, by Python's version
    usual, edit = [value for value in assigned(forward(), "x_in") if value.startswith("torch.cat")]
    assert usual == f"{stacked} + [x])" and edit == f"{stacked} + [x] + [x])"
    assert assigned(forward(), "repeats") == ["[len(conds_list[i]) for i in range(batch_size)]"]
    skipped = [ast.unparse(node) for node in ast.walk(forward()) if isinstance(node, ast.If) and ast.unparse(node.test) == "skip_uncond"]
    assert any("x_in = x_in[:-batch_size]" in text for text in skipped)


def test_calls_of_the_model_take_the_rows_in_their_order():
    """All at once, or in slices that count on from the first, the unconditional ones last."""
    latents = [ast.unparse(call.args[0]) for call in calls(forward(), "self.inner_model")]
    assert latents == ["x_in", "x_in[a:b]", "x_in[a:b]", "x_in[-uncond.shape[0]:]"]
    loops = [ast.unparse(node.iter) for node in ast.walk(forward()) if isinstance(node, ast.For)]
    assert "range(0, x_out.shape[0], batch_size)" in loops and "range(0, tensor.shape[0], batch_size)" in loops


def test_the_edit_model():
    assert assigned(forward(), "is_edit_model") == [
        "shared.sd_model.cond_stage_key == 'edit' and self.image_cfg_scale is not None and (self.image_cfg_scale != 1.0)"
    ]


def test_the_step_that_schedules_are_looked_up_by():
    for name, conditions in (("reconstruct_multicond_batch", "cond"), ("reconstruct_cond_batch", "uncond")):
        [call] = calls(forward(), f"prompt_parser.{name}")
        assert [ast.unparse(each) for each in call.args] == [conditions, "self.step"]


def test_schedules_of_prompts():
    parser = tree_of("prompt_parser")
    found = definitions(parser)
    names = ["model", "prompts", "steps", "hires_steps", "use_old_scheduling"]
    assert parameters(found["get_learned_conditioning"]) == names
    conditioning = definitions(found["SdConditioning"])["__init__"]
    assert parameters(conditioning) == ["self", "prompts", "is_negative_prompt", "width", "height", "copy_from"]
    fields = assigned(parser, "ScheduledPromptConditioning")
    assert fields == ["namedtuple('ScheduledPromptConditioning', ['end_at_step', 'cond'])"]
    lookup = ast.unparse(found["reconstruct_cond_batch"])
    assert "target_index = 0" in lookup and "if current_step <= entry.end_at_step:" in lookup  # past the last: the first


def test_a_dictionary_of_conditions_is_sdxls():
    text = ast.unparse(forward())
    assert "{**c_crossattn, 'c_concat': [c_concat]}" in text and "{'c_crossattn': [c_crossattn], 'c_concat': [c_concat]}" in text
    assert "'c_adm': c_adm" in text


@pytest.mark.parametrize("kind", ["StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"])
def test_what_is_read_of_the_processing_object(kind):
    found = definitions(tree_of("processing"))[kind]
    fields = {node.target.id for node in found.body if isinstance(node, ast.AnnAssign)}
    methods = {node.name for node in found.body if isinstance(node, ast.FunctionDef)}
    if kind == "StableDiffusionProcessing":
        assert {"extra_generation_params", "sampler_name", "steps", "width", "height"} <= fields and "comment" in methods
    else:
        assert {"enable_hr", "hr_second_pass_steps", "hr_sampler_name"} <= fields
        assert {"hr_upscale_to_x", "hr_upscale_to_y"} <= fields
        assert all(f"self.is_hr_pass = {each}" in ast.unparse(found) for each in (True, False))


def test_steps_are_counted_as_the_host_counts_them():
    processing = ast.unparse(tree_of("processing"))
    assert "sampler_config.total_steps(steps) if sampler_config else steps" in processing
    assert "self.firstpass_steps = total_steps" in processing
    assert "total_steps" in definitions(tree_of("sd_samplers_common"))["SamplerData"].body[-1].name


def test_extra_networks_are_taken_out_of_a_prompt():
    found = definitions(tree_of("extra_networks"))["parse_prompt"]
    assert parameters(found) == ["prompt"]
    assert ast.unparse(found.body[-1]) == "return (prompt, res)" and "res = defaultdict(list)" in ast.unparse(found)
