"""The AUTOMATIC1111 Stable Diffusion WebUI as a host: the only place that imports `modules.*`, gradio or fastapi (layer 3).

`host` says whether this is a host we know; `patching` puts functions of ours in front of the host's; `stock` finds what
stock `--lowvram` put on a model and swaps it with stand-ins and back; `regions` names the networks; `lowvram` is the
integration that ties them to the mover; `settings` reads the options; `status` answers over HTTP. Nothing here touches the
host at import: everything starts from `scripts/async_lowvram.py`.
"""
