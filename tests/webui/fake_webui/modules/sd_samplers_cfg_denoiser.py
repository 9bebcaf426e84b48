"""One step under guidance: conditions and their unconditional twins through the model, together or one after the other."""

import torch

from modules import prompt_parser, sd_models, sd_samplers_common, shared


def _rows(cond, first, end):
    return {key: value[first:end] for key, value in cond.items()} if isinstance(cond, dict) else cond[first:end]


def _joined(a, b):
    return {key: torch.cat([a[key], b[key]]) for key in a} if isinstance(a, dict) else torch.cat([a, b])


def _conditions(cond, image_cond):
    prompt = dict(cond) if isinstance(cond, dict) else {"c_crossattn": [cond]}
    return {**prompt, "c_concat": [image_cond]}


class _Wrap(torch.nn.Module):
    """The sampler's side of a model: predicts the clean latent from a noisy one, pointwise around `apply_model`."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, x, sigma, **kwargs):
        scale = sigma[:, None, None, None]
        return x - scale * self.inner_model.apply_model(x / (scale**2 + 1) ** 0.5, sigma, **kwargs)


class CFGDenoiser(torch.nn.Module):
    def __init__(self, sampler):
        super().__init__()
        self.sampler, self.model_wrap, self.p = sampler, None, None
        self.step, self.total_steps, self.image_cfg_scale = 0, 1, None

    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = _Wrap(sd_models.model_data.sd_model)
        return self.model_wrap

    def update_inner_model(self):
        self.model_wrap = None
        self.sampler.sampler_extra_args["cond"], self.sampler.sampler_extra_args["uncond"] = self.p.get_conds()

    def forward(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if shared.state.interrupted:
            raise sd_samplers_common.InterruptedException
        if sd_samplers_common.apply_refiner(self, sigma):
            cond, uncond = self.sampler.sampler_extra_args["cond"], self.sampler.sampler_extra_args["uncond"]
        listed, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        plain = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        batch, repeats = len(listed), [len(each) for each in listed]
        x_in, sigma_in, image_in = (
            torch.cat([torch.stack([value[i] for _ in range(n)]) for i, n in enumerate(repeats)] + [value])
            for value in (x, sigma, image_cond)
        )
        out = torch.zeros_like(x_in)
        if tensor.shape[1] == plain.shape[1]:
            together = _joined(tensor, plain)
            at_once = len(x_in) if shared.opts.batch_cond_uncond else batch
            for a in range(0, len(x_in), at_once):
                b = a + at_once
                out[a:b] = self.inner_model(x_in[a:b], sigma_in[a:b], cond=_conditions(_rows(together, a, b), image_in[a:b]))
        else:
            at_once = 2 * batch if shared.opts.batch_cond_uncond else batch
            for a in range(0, tensor.shape[0], at_once):
                b = min(a + at_once, tensor.shape[0])
                out[a:b] = self.inner_model(x_in[a:b], sigma_in[a:b], cond=_conditions(_rows(tensor, a, b), image_in[a:b]))
            out[-batch:] = self.inner_model(x_in[-batch:], sigma_in[-batch:], cond=_conditions(plain, image_in[-batch:]))
        denoised = out[-batch:].clone()
        for image, prompts in enumerate(listed):
            for row, weight in prompts:
                denoised[image] += (out[row] - out[-batch:][image]) * (weight * cond_scale)
        self.step += 1
        return denoised
