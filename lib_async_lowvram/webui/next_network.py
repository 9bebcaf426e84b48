"""Which network the host runs next, as far as that is known when a pass starts: for `AsyncModelMover.expect`.

Problem: a picture takes text encoder, UNet and VAE in turn, several passes each, and the mover can fetch the next one's weights while
the present one computes - if it is told in time, and not too early: what is fetched takes room that the budget may have another use
for.

- After the text encoder comes the UNet. Every prompt is a pass, and all of them come before sampling. Not where a model has several
  text networks (SD3's): they take turns, and each turn would throw away what was fetched.
- After the UNet's last pass comes the VAE's decoder, if the host decodes with it. What is fetched as a pass ends travels while the next
  one computes, so it is asked for in the second to last step. The host sets `state.sampling_step` in the sampler's callback, after the
  step's first call of the model (`sd_samplers_common.Sampler.callback_state`): in the second to last of N steps, counted from 0, N - 3
  is still there. Samplers that call the model twice per step, several tiles or conditions ask a few passes early; that only takes room
  that nobody uses a little longer. A sampler that does not know its steps (DPM adaptive) may never get there.

Pure functions of the host's state. Called by `lowvram` on the thread that computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_async_lowvram.webui.regions import TEXT, UNET, VAE_DECODE


def expected_after(network: str, names: Mapping[str, str], shared: Any) -> str | None:
    """The mover's name of the network that follows `network`, whose pass starts; None where that is not known. `names`: see `Link`.
    `shared`: the host's module."""
    following = None
    if network == TEXT and not any(other.startswith(f"{TEXT}_") for other in names):
        following = UNET
    elif network == UNET and _ends_soon(shared.state) and shared.opts.data.get("sd_vae_decode_method", "Full") == "Full":
        following = VAE_DECODE
    return names.get(following)


def _ends_soon(state: Any) -> bool:
    steps = getattr(state, "sampling_steps", 0)
    return steps > 0 and state.sampling_step >= steps - 3
