"""For the end-to-end tests only: a UNet of its own for the `sd_unet` option, traced from a copy of the model's, as engines are built."""

import copy

import torch
from modules import script_callbacks, sd_unet, shared

LABEL = "probe traced"


class Traced(sd_unet.SdUnet):
    """Weights of its own, for one size of picture."""

    def __init__(self):
        super().__init__()
        self.inner = None

    def forward(self, x, timesteps, context, *args, **kwargs):
        if self.inner is None:
            original = copy.deepcopy(shared.sd_model.model.diffusion_model)
            # The host's patched forward would come back here.
            current, sd_unet.current_unet = sd_unet.current_unet, None
            try:
                with torch.no_grad():
                    self.inner = torch.jit.trace(Called(original), (x, timesteps, context), check_trace=False)
            finally:
                sd_unet.current_unet = current
        return self.inner(x, timesteps, context)

    def deactivate(self):
        self.inner = None


class Called(torch.nn.Module):
    """Arguments by place, as tracing wants them."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timesteps, context):
        return self.unet(x, timesteps=timesteps, context=context)


class Option(sd_unet.SdUnetOption):
    label = LABEL

    def create_unet(self):
        return Traced()


script_callbacks.on_list_unets(lambda options: options.append(Option()))
