"""diffusers' samplers by name, as the models were trained: noise schedule, and where steps lie.

Problem: a scheduler's defaults are those of some other model, and each takes other arguments. Values are the published models'
(scaled_linear, 0.00085 to 0.012 over 1000 steps); arguments that a class does not take are left out.
"""

from __future__ import annotations

import inspect
from typing import Any

from lib_async_lowvram.standalone.errors import CannotMake

NAMES = {
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "DPM++ single": "DPMSolverSinglestepScheduler",
    "DEIS": "DEISMultistepScheduler",
    "Heun": "HeunDiscreteScheduler",
    "DPM2": "KDPM2DiscreteScheduler",
    "DPM2 a": "KDPM2AncestralDiscreteScheduler",
    "LMS": "LMSDiscreteScheduler",
    "PNDM": "PNDMScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
"""Short name -> diffusers' class; either may be given."""

_TRAINED = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def class_name(name: str) -> str:
    """diffusers' name of a sampler. `CannotMake` for one that is unknown here."""
    known = {key.lower(): value for key, value in NAMES.items()} | {value.lower(): value for value in NAMES.values()}
    known |= {value.lower().removesuffix("scheduler"): value for value in NAMES.values()}
    found = known.get(name.strip().lower())
    if found is None:
        raise CannotMake(f"{name!r} is no sampler: {', '.join(NAMES)}, or the name of diffusers' class")
    return found


def sampler(name: str) -> Any:
    """A scheduler of its own, for epsilon-predicting models of the SD family."""
    import diffusers

    made = getattr(diffusers, class_name(name))
    taken = inspect.signature(made.__init__).parameters
    try:
        return made(**{key: value for key, value in _TRAINED.items() if key in taken})
    except ImportError as error:  # some need scipy
        raise CannotMake(f"{name}: {str(error).splitlines()[0]}") from error
