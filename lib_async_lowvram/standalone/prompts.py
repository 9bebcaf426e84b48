"""Prompts as the UNet takes them: states of the text encoders, and for SDXL their pooled output with the picture's size.

As diffusers' pipelines do: the prompt's first 75 tokens; SD1's last states, normed; SDXL's states before the last layer, of both encoders
side by side, and zeros where no negative prompt was given.

On the thread that computes, inside the mover's passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.log import logger
from lib_async_lowvram.standalone.families import Family
from lib_async_lowvram.standalone.request import Request
from lib_async_lowvram.standalone.tokenizer import Tokenizer


@dataclass(frozen=True)
class Encoded:
    """states: [samples, 77, width], the negative prompt's first. more: `added_cond_kwargs` of the UNet, or None."""

    states: torch.Tensor
    more: dict[str, torch.Tensor] | None


def encode(request: Request, family: Family, encoders: tuple[nn.Module, ...], words: Tokenizer, device: torch.device) -> Encoded:
    """Of the request's prompts. One pass per encoder and prompt."""
    prompts = [request.prompt]
    if request.conditions == 2:
        prompts.insert(0, request.negative_prompt)
    rows, pooled = [], []
    for prompt in prompts:
        states, last = [], None
        for description, encoder in zip(family.text, encoders, strict=True):
            numbers, cut = words.padded(prompt, description.pads_with)
            if cut:
                logger.warning("%d tokens of the prompt are beyond the %d that the model reads, and are left out", cut, len(numbers) - 2)
            ids = torch.tensor([numbers], device=device)
            found: Any = encoder(ids, output_hidden_states=description.penultimate)
            states.append(found.hidden_states[-2] if description.penultimate else found.last_hidden_state)
            if description.projects:
                last = found.text_embeds
        rows.append(torch.cat(states, -1))
        pooled.append(last)
    if family.text_time and request.conditions == 2 and not request.negative_prompt:
        rows[0], pooled[0] = torch.zeros_like(rows[0]), torch.zeros_like(pooled[0])
    if not family.text_time:
        return Encoded(torch.cat(rows), None)
    size = [float(value) for value in (request.height, request.width, 0, 0, request.height, request.width)]
    times = torch.tensor([size] * len(rows), device=device, dtype=pooled[-1].dtype)
    return Encoded(torch.cat(rows), {"text_embeds": torch.cat(pooled), "time_ids": times})
