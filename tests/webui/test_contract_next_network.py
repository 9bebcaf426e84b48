"""What `next_network` believes of how the host counts steps, against the sources of a real WebUI, where SD_WEBUI_DIR names a checkout."""

from __future__ import annotations

import ast

from checkout import NEEDS_CHECKOUT, definitions, tree_of

pytestmark = NEEDS_CHECKOUT


def test_a_step_is_told_in_the_samplers_callback_and_their_number_before_the_first():
    sampler = definitions(definitions(tree_of("sd_samplers_common"))["Sampler"], ast.FunctionDef)
    callback = ast.unparse(sampler["callback_state"])
    assert "step = d['i']" in callback and "state.sampling_step = step" in callback
    launch = ast.unparse(sampler["launch_sampling"])
    assert "state.sampling_steps = steps" in launch and "state.sampling_step = 0" in launch


def test_prompts_come_before_sampling_and_the_vae_after_it():
    function = ast.unparse(definitions(tree_of("processing"))["process_images_inner"])
    steps = ("p.init(", "p.setup_conds()", "p.sample(", "decode_latent_batch(", "send_everything_to_cpu()")
    order = [function.index(text) for text in steps]
    assert order == sorted(order)


def test_the_vae_may_not_be_what_decodes():
    assert "approximation_indexes.get(opts.sd_vae_decode_method, 0)" in ast.unparse(tree_of("sd_samplers_common"))
    added = ast.unparse(tree_of("shared_options"))
    assert "'sd_vae_decode_method': OptionInfo('Full'" in added
