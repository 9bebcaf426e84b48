"""What stock leaves on a model, as objects, to compare with."""

from __future__ import annotations

from lib_async_lowvram.webui import patching


def hooks_of(model):
    """Every forward pre-hook of a model and the VAE's instance attributes: what `--lowvram` leaves behind, as objects."""
    vae = model.first_stage_model
    found = {name: dict(module._forward_pre_hooks) for name, module in model.named_modules() if module._forward_pre_hooks}
    return found | {"encode": vars(vae).get("encode"), "decode": vars(vae).get("decode")}


def same_objects(one, other):
    def ids(found):
        hooks = {name: [(key, id(fn)) for key, fn in value.items()] for name, value in found.items() if isinstance(value, dict)}
        return hooks | {name: id(value) for name, value in found.items() if not isinstance(value, dict)}

    return ids(one) == ids(other)


def stock_setup(webui, model):
    """What stock alone puts on a model."""
    patching_is_on = patching.handler_of(webui.lowvram, "setup_for_low_vram")
    assert patching_is_on is None
    webui.sd_models.send_model_to_device(model)
    webui.sd_models.model_data.set_sd_model(model)
    return hooks_of(model)
