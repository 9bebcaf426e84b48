"""Where samplers hand their latents over."""

from modules import shared

approximation_indexes = {"Full": 0, "Approx NN": 1, "Approx cheap": 2, "TAESD": 3}


def store_latent(decoded):
    state, opts = shared.state, shared.opts
    state.current_latent = decoded
    every = opts.show_progress_every_n_steps
    if opts.live_previews_enable and every > 0 and state.sampling_step % every == 0 and not shared.parallel_processing_allowed:
        state.assign_current_image(("inline", float(decoded[0].flatten()[0])))
