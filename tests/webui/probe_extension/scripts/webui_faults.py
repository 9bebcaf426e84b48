"""An extension for the end-to-end tests only: running out of memory in the middle of a UNet pass, on demand.

Problem: a CPU does not run out of device memory, and a test outside the process cannot make it. POST /webui-fault arms one fault,
GET tells how often it struck. Kinds: `torch` (torch's own error) and `doggettx` (the RuntimeError of the WebUI's attention), raised
as a layer of the UNet is called; `lora`, raised while the built-in Lora extension computes what it adds to a layer.
"""

import sys
import threading

import torch
from fastapi import Body
from modules import script_callbacks, sd_models

MESSAGES = {
    "torch": "CUDA out of memory. Tried to allocate 1.00 GiB (made by a test)",
    "lora": "CUDA out of memory. Tried to allocate 2.00 GiB (made by a test)",
    "doggettx": "Not enough memory, use lower resolution (max approx. 64x64). Need: 0.1GB free, Have:0.0GB free (made by a test)",
}


class Fault:
    """Strikes at the calls `first` .. `first` + `times` - 1, counted from 0, of what was armed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._take_back = None
        self.struck = self.seen = 0

    def disarm(self):
        take_back, self._take_back = self._take_back, None
        if take_back is not None:
            take_back()

    def arm(self, order: dict = Body(...)):  # noqa: B008 - FastAPI's way
        """`order`: kind, first, times; `place`: which of the UNet's layers with weights, from 0.0 for the first to 1.0."""
        self.disarm()
        self.struck = self.seen = 0
        kind, first, times = order["kind"], order["first"], order["times"]

        def strike(*_):
            with self._lock:
                number, self.seen = self.seen, self.seen + 1
                strikes = first <= number < first + times
                self.struck += strikes
            if strikes:
                raise (RuntimeError if kind == "doggettx" else torch.cuda.OutOfMemoryError)(MESSAGES[kind])

        if kind == "lora":
            owner = sys.modules["network_lora"].NetworkModuleLora
            calculate = owner.calc_updown

            def calc_updown(module, weight):
                strike()
                return calculate(module, weight)

            owner.calc_updown = calc_updown
            self._take_back = lambda: setattr(owner, "calc_updown", calculate)
        else:
            unet = sd_models.model_data.sd_model.model.diffusion_model
            layers = [module for module in unet.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
            layer = layers[round(order["place"] * (len(layers) - 1))]
            self._take_back = layer.register_forward_pre_hook(strike).remove
        return self.tell()

    def tell(self):
        return {"seen": self.seen, "struck": self.struck}

    def end(self):
        self.disarm()
        return self.tell()


fault = Fault()


def add_route(demo, app):
    app.add_api_route("/webui-fault", fault.arm, methods=["POST"])
    app.add_api_route("/webui-fault", fault.end, methods=["GET"])


script_callbacks.on_app_started(add_route)
