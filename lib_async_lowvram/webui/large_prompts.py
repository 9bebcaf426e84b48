"""The prompts of regions, encoded by the host's own functions, and put in the place of the picture's.

Problem: a region's prompt is a prompt like any other: with weights, prompt editing ([a:b:0.5]), embeddings, of any length. So the
host's own `prompt_parser.get_learned_conditioning` encodes it, into the same schedules that the picture's prompt has, and the entry
for the present step is looked up as the host looks it up. Once per job and model: a refiner's text encoder is another one.

What one call of the model is given is rows of several kinds, conditions of each picture and then its unconditional ones; a region's
prompt stands in for the first, its negative, if it has one, for the others. Rows of one call are equally wide: shorter prompts are
filled up with the empty prompt, as the host's option "Pad prompt/negative prompt" does, or with their last vector where the widths
do not divide.

`<lora:...>` in a region's prompt cannot be kept to the region: it is taken out, and `notes` says so.

Called by `large_denoise` on the thread that samples, between two passes of the UNet.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lib_async_lowvram.large.pieces import BACKGROUND
from lib_async_lowvram.large.regions import Region
from lib_async_lowvram.large.spatial import CannotTile

CONDITION, UNCONDITIONAL = "condition", "unconditional"
"""What a row of a call is for."""


class RegionPrompts:
    """`p`: the host's processing object. Attributes: notes: one line for each thing in the prompts that was not taken."""

    def __init__(self, p: Any, regions: Sequence[Region]) -> None:
        self._p = p
        self._key: Any = None
        self._schedules: list[tuple[list, list | None]] = []  # of each region: its prompt's, its negative's
        self.notes: list[str] = []
        networks = importlib.import_module("modules.extra_networks")
        self._texts: list[tuple[str, str | None]] = []
        for number, region in enumerate(regions, start=1):
            texts = []
            for text in (region.prompt, region.negative):
                plain, found = (None, {}) if text is None else networks.parse_prompt(text)
                if found:
                    self.notes.append(f"region {number}: {', '.join(sorted(found))} counts for a whole picture, and is left out here")
                texts.append(plain)
            self._texts.append((texts[0], texts[1]))

    # -- encoding ------------------------------------------------------------------------------------------------------
    def encode(self, model: nn.Module) -> None:
        """With the text encoder of `model`, unless that has been done: for each checkpoint and each pass of hires fix once."""
        hires = bool(getattr(self._p, "is_hr_pass", False))
        key = (id(model), id(getattr(model, "sd_checkpoint_info", None)), hires)
        if key == self._key:
            return
        parser, devices = importlib.import_module("modules.prompt_parser"), importlib.import_module("modules.devices")
        opts = importlib.import_module("modules.shared").opts
        steps, hires_steps = self._steps(hires)

        def schedules(texts: list[str], negative: bool) -> dict[str, list]:
            if not texts:
                return {}
            width, height = self._size(hires)
            given = parser.SdConditioning(texts, is_negative_prompt=negative, width=width, height=height)
            with devices.autocast():
                made = parser.get_learned_conditioning(model, given, steps, hires_steps, getattr(opts, "use_old_scheduling", False))
            return dict(zip(texts, made, strict=True))

        prompts = schedules(list(dict.fromkeys(prompt for prompt, _ in self._texts)), False)
        negatives = schedules(list(dict.fromkeys(negative for _, negative in self._texts if negative is not None)), True)
        self._schedules = [(prompts[prompt], None if negative is None else negatives[negative]) for prompt, negative in self._texts]
        self._key = key

    def _steps(self, hires: bool) -> tuple[int, int | None]:
        """(steps of the first pass, of the second or None), as the host counts them for prompt editing."""
        p, samplers = self._p, importlib.import_module("modules.sd_samplers")

        def total(name: str, steps: int) -> int:
            config = samplers.find_sampler_config(name)
            return config.total_steps(steps) if config else steps

        first = getattr(p, "firstpass_steps", None) or total(p.sampler_name, p.steps)
        if not hires:
            return first, None
        return first, total(p.hr_sampler_name or p.sampler_name, p.hr_second_pass_steps or p.steps)

    def _size(self, hires: bool) -> tuple[int, int]:
        p = self._p
        return (p.hr_upscale_to_x, p.hr_upscale_to_y) if hires else (p.width, p.height)

    # -- one call --------------------------------------------------------------------------------------------------------
    def conditions(self, sources: Sequence[int], cond: Any, kinds: Sequence[str], step: int, model: nn.Module) -> dict[int, Any]:
        """`cond`, whose rows are of these `kinds`, under the prompt of each of `sources`, all equally wide. CannotTile for conditions
        without a prompt."""
        own = _prompt_of(cond)
        rows = {source: [self._row(source, kind, number, own, step) for number, kind in enumerate(kinds)] for source in sources}
        tokens = max(row["crossattn"].shape[0] for each in rows.values() for row in each)
        empty = getattr(model, "cond_stage_model_empty_prompt", None)
        if isinstance(empty, dict):
            empty = empty["crossattn"]
        made = {}
        for source, each in rows.items():
            if source == BACKGROUND and own["crossattn"].shape[1] == tokens:
                made[source] = cond
                continue
            stacked = {}
            for key, like in own.items():
                values = [row[key].to(like) for row in each]
                if key == "crossattn":
                    values = [_widened(value, tokens, empty) for value in values]
                stacked[key] = torch.stack(values)
            made[source] = _with_prompt(cond, stacked)
        return made

    def _row(self, source: int, kind: str, number: int, own: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        schedule = None
        if source != BACKGROUND:
            prompt, negative = self._schedules[source - 1]
            schedule = prompt if kind == CONDITION else negative
        if schedule is None:
            return {key: value[number] for key, value in own.items()}
        entry = next((each for each in schedule if step <= each.end_at_step), schedule[0])  # past the last: the first, as the host's
        encoded = entry.cond if isinstance(entry.cond, dict) else {"crossattn": entry.cond}
        return {key: encoded[key] if key in encoded else value[number] for key, value in own.items()}


def _prompt_of(cond: Any) -> dict[str, torch.Tensor]:
    """What of the conditions is the prompt's, [rows, ...] each: SD1 and SD2 have an embedding, SDXL a pooled vector as well."""
    if isinstance(cond, dict):
        if len(cond.get("c_crossattn") or ()) == 1:
            return {"crossattn": cond["c_crossattn"][0]}
        if "crossattn" in cond:
            return {key: cond[key] for key in ("crossattn", "vector") if key in cond}
    raise CannotTile("these conditions have no prompt that a region's could replace")


def _with_prompt(cond: dict, prompt: dict[str, torch.Tensor]) -> dict:
    if "c_crossattn" in cond:
        return {**cond, "c_crossattn": [prompt["crossattn"]]}
    return {**cond, **prompt}


def _widened(value: torch.Tensor, tokens: int, empty: torch.Tensor | None) -> torch.Tensor:
    """[n, width] -> [tokens, width]"""
    missing = tokens - value.shape[0]
    if not missing:
        return value
    if empty is not None and missing % empty.shape[-2] == 0:
        filling = empty.reshape(-1, *empty.shape[-2:])[0].to(value).repeat(missing // empty.shape[-2], 1)
    else:
        filling = value[-1:].repeat(missing, 1)
    return torch.cat([value, filling])
