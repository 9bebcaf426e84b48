"""Loading, switching and throwing away models."""

import torch

from modules import devices, lowvram


class SdModelData:
    def __init__(self):
        self.sd_model = None
        self.loaded_sd_models = []

    def set_sd_model(self, model):
        self.sd_model = model
        if model in self.loaded_sd_models:
            self.loaded_sd_models.remove(model)
        if model is not None:
            self.loaded_sd_models.insert(0, model)


model_data = SdModelData()


def send_model_to_cpu(m):
    if m is not None:
        if m.lowvram:
            lowvram.send_everything_to_cpu()
        else:
            m.to(devices.cpu)
    devices.torch_gc()


def send_model_to_device(m):
    lowvram.apply(m)


def send_model_to_trash(m):
    m.to(device="meta")
    devices.torch_gc()


def unload_model_weights(sd_model=None, info=None):
    send_model_to_cpu(sd_model or model_data.sd_model)


def get_empty_cond(sd_model):
    with torch.no_grad():
        return sd_model.condition(torch.tensor([[0]]))


def load_model(create):
    """`create`: returns the new model. Stands in for reading a checkpoint."""
    if model_data.sd_model is not None:
        send_model_to_trash(model_data.sd_model)
        model_data.sd_model = None
        devices.torch_gc()
    model = create()
    send_model_to_device(model)
    model_data.set_sd_model(model)
    model.cond_stage_model_empty_prompt = get_empty_cond(model)
    return model


def load_beside(create):
    """Another model while the first one stays in memory."""
    send_model_to_cpu(model_data.sd_model)
    model_data.sd_model = None
    return load_model(create)


def use_loaded(model):
    """Back to a model that stayed in memory."""
    send_model_to_cpu(model_data.sd_model)
    send_model_to_device(model)
    model_data.set_sd_model(model)


def load_weights_in_place(model, state_dict):
    """Another checkpoint into the same parameters."""
    send_model_to_cpu(model)
    model.load_state_dict(state_dict, strict=False)
