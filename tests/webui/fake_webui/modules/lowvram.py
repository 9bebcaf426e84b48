"""Stock `--lowvram`, by behaviour: one closure hooks every part of a model, so that one part at a time is on the device."""

import torch

from modules import devices, shared

module_in_gpu = None
cpu = torch.device("cpu")


def send_everything_to_cpu():
    global module_in_gpu
    leaving, module_in_gpu = module_in_gpu, None
    if leaving is not None:
        leaving.to(cpu)


def is_needed(sd_model):
    return shared.cmd_opts.lowvram or shared.cmd_opts.medvram


def is_enabled(sd_model):
    return sd_model.lowvram


def apply(sd_model):
    wanted = is_needed(sd_model)
    shared.parallel_processing_allowed = not wanted
    if wanted:
        setup_for_low_vram(sd_model, not shared.cmd_opts.lowvram)
    else:
        sd_model.lowvram = False


def setup_for_low_vram(sd_model, use_medvram):
    if getattr(sd_model, "lowvram", False):
        return
    sd_model.lowvram = True
    parents = {}

    def send_me_to_gpu(module, _):
        global module_in_gpu
        wanted = parents.get(module, module)
        if wanted is module_in_gpu:
            return
        if module_in_gpu is not None:
            module_in_gpu.to(cpu)
        wanted.to(devices.device)
        module_in_gpu = wanted

    first_stage_model = sd_model.first_stage_model
    first_stage_model_encode = first_stage_model.encode
    first_stage_model_decode = first_stage_model.decode

    def first_stage_model_encode_wrap(x):
        send_me_to_gpu(first_stage_model, None)
        return first_stage_model_encode(x)

    def first_stage_model_decode_wrap(z):
        send_me_to_gpu(first_stage_model, None)
        return first_stage_model_decode(z)

    for name in ("depth_model", "embedder"):
        setattr(sd_model, name, getattr(sd_model, name, None))  # a model without them has them as None from here on

    announcers = [(first_stage_model, None)]
    if hasattr(sd_model, "conditioner"):
        announcers.append((sd_model.conditioner, None))
    elif hasattr(sd_model.cond_stage_model, "model"):
        encoder = sd_model.cond_stage_model.model
        announcers += [(encoder, sd_model.cond_stage_model), (encoder.token_embedding, sd_model.cond_stage_model)]
    else:
        announcers.append((sd_model.cond_stage_model.transformer, sd_model.cond_stage_model))
    announcers += [(part, None) for part in (getattr(sd_model, "depth_model", None), getattr(sd_model, "embedder", None)) if part]
    if use_medvram:
        announcers.append((sd_model.model, None))
    else:
        unet = sd_model.model.diffusion_model
        announcers += [(block, None) for block in (unet.time_embed, *unet.input_blocks, unet.middle_block, *unet.output_blocks)]

    for module, parent in announcers:
        module.register_forward_pre_hook(send_me_to_gpu)
        if parent is not None:
            parents[module] = parent
    first_stage_model.encode = first_stage_model_encode_wrap
    first_stage_model.decode = first_stage_model_decode_wrap
