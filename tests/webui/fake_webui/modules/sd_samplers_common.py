"""Where samplers hand their latents over."""

from modules import shared

approximation_indexes = {"Full": 0, "Approx NN": 1, "Approx cheap": 2, "TAESD": 3}


def store_latent(decoded):
    state, opts = shared.state, shared.opts
    state.current_latent = decoded
    every = opts.show_progress_every_n_steps
    if opts.live_previews_enable and every > 0 and state.sampling_step % every == 0 and not shared.parallel_processing_allowed:
        state.assign_current_image(("inline", float(decoded[0].flatten()[0])))


class InterruptedException(BaseException):
    pass


def apply_refiner(cfg_denoiser, sigma=None):
    p = cfg_denoiser.p
    refiner = getattr(p, "refiner", None)
    if refiner is None or cfg_denoiser.step / cfg_denoiser.total_steps < p.refiner_switch_at:
        return False
    from modules import sd_models

    if sd_models.model_data.sd_model is refiner:
        return False
    sd_models.use_loaded(refiner)
    p.setup_conds()
    cfg_denoiser.update_inner_model()
    return True
