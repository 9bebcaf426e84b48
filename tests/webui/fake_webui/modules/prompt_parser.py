"""Prompts that change with the steps. `[a:b:n]` alone is understood: a until step n, then b; `AND` joins prompts."""

import re
from collections import namedtuple

import torch

ScheduledPromptConditioning = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])

_EDITED = re.compile(r"\[([^:\[\]]*):([^:\[\]]*):(\d+)\]")


class SdConditioning(list):
    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        source = prompts if copy_from is None else copy_from
        self.is_negative_prompt = is_negative_prompt or getattr(source, "is_negative_prompt", False)
        self.width = width or getattr(source, "width", None)
        self.height = height or getattr(source, "height", None)


class ComposableScheduledPromptConditioning:
    def __init__(self, schedules, weight=1.0):
        self.schedules, self.weight = schedules, weight


class MulticondLearnedConditioning:
    def __init__(self, shape, batch):
        self.shape, self.batch = shape, batch


class DictWithShape(dict):
    @property
    def shape(self):
        return self["crossattn"].shape


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    last = hires_steps or steps
    found = []
    for prompt in prompts:
        edit = _EDITED.search(prompt)
        texts = [(last, prompt)]
        if edit:
            before, after, at = edit.groups()
            texts = [(int(at), _EDITED.sub(before, prompt)), (last, _EDITED.sub(after, prompt))]
        conds = model.get_learned_conditioning(SdConditioning([text for _, text in texts], copy_from=prompts))
        entries = []
        for number, (end, _) in enumerate(texts):
            cond = {key: value[number] for key, value in conds.items()} if isinstance(conds, dict) else conds[number]
            entries.append(ScheduledPromptConditioning(end, cond))
        found.append(entries)
    return found


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    batch = []
    for prompt in prompts:
        parts = SdConditioning([part.strip() for part in prompt.split(" AND ")], copy_from=prompts)
        batch.append([ComposableScheduledPromptConditioning(s) for s in get_learned_conditioning(model, parts, steps, hires_steps)])
    return MulticondLearnedConditioning((len(prompts),), batch)


def _at(schedule, step):
    return next((entry for entry in schedule if step <= entry.end_at_step), schedule[0]).cond


def _stacked(conds):
    if isinstance(conds[0], dict):
        return DictWithShape({key: torch.stack([cond[key] for cond in conds]) for key in conds[0]})
    return torch.stack(conds)


def reconstruct_cond_batch(c, current_step):
    return _stacked([_at(schedule, current_step) for schedule in c])


def reconstruct_multicond_batch(c, current_step):
    conds, found = [], []
    for prompts in c.batch:
        found.append([(len(conds) + number, prompt.weight) for number, prompt in enumerate(prompts)])
        conds += [_at(prompt.schedules, current_step) for prompt in prompts]
    return found, _stacked(conds)
