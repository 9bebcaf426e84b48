"""Which network this is, of the layouts of AutoencoderKL that can be computed in bands: the LDM code's, or diffusers'.

Pure; any thread. Called by `tiled_vae`.
"""

from __future__ import annotations

from torch import nn

from lib_async_lowvram.large import diffusers_vae, vae_steps
from lib_async_lowvram.large.vae_steps import Step


def kind_of(network: nn.Module) -> str:
    """`vae_steps.DECODER` or `ENCODER`. `Untileable` for what is neither."""
    return diffusers_vae.kind_of(network) or vae_steps.kind_of(network)


def steps_of(network: nn.Module) -> list[Step]:
    """Of an encoder or a decoder. `Untileable` as above."""
    return diffusers_vae.steps_of(network) if diffusers_vae.kind_of(network) else vae_steps.steps_of(network)
