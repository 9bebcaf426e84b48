"""Pictures without a WebUI: `python -m lib_async_lowvram txt2img`, from one checkpoint file, within a set amount of memory.

The networks are diffusers' and transformers' classes, created without memory (`networks`) over weights that stay in their file
(`checkpoint`); one mover brings them to where they compute, a tiled denoiser (`denoise`) and a tiled VAE (`pictures`) keep activations
within what `shares` leaves for them. Nothing is fetched from anywhere: configurations are `families`', the tokenizer's vocabulary
comes from an installed package (`tokenizer`).

Layer 4, beside `bench`; a command calls it (`commands.txt2img`). Needs the extra `standalone` of pyproject.toml; imports it when a
picture is made.
"""
