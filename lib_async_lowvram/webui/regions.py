"""The networks of a WebUI model, told to the mover: which regions run as one cycle, and what one pass of it is.

Problem: stock hooks modules, not networks. Order, plan, ring and resident set belong to a network, so the hooked modules
are sorted into the UNet, the text encoder, the two halves of the VAE, the depth model and the embedder.
Invariant: every parameter stock would move is in the regions of exactly one network or still under stock's own hooks, so
nothing stock moved is left behind on the host.
Called while a model is set up; pure apart from reading the model.
"""

from __future__ import annotations

from torch import nn

from lib_async_lowvram.network_spec import NetworkSpec, Region
from lib_async_lowvram.webui.stock import VAE_METHODS, Harvest

UNET, TEXT = "unet", "text"
VAE_ENCODE, VAE_DECODE = "vae_encode", "vae_decode"

# Which parts of an autoencoder each method reads, each of them by calling it. A VAE with weights anywhere else is left to
# stock: its own `encode` might read them without a call that would announce it.
_VAE_SIDES = {
    VAE_ENCODE: ("encoder", "quant_conv"),
    VAE_DECODE: ("decoder", "post_quant_conv"),
}


def _owns_tensors(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _owns_tensors_beside(module: nn.Module, part: nn.Module) -> bool:
    """Whether `module` has weights or buffers outside `part` of it."""
    inside = {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    return any(id(tensor) not in inside for tensor in (*module.parameters(), *module.buffers()))


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """What stock `--lowvram` would hook in it, as far as it is there: the regions of the learning pass."""
    parts = [getattr(unet, name, None) for name in ("time_embed", "input_blocks", "middle_block", "output_blocks")]
    found = [block for part in parts for block in (part if isinstance(part, nn.ModuleList) else [part])]
    return found if all(isinstance(block, nn.Module) for block in found) else list(unet.children())


def vae_networks(vae: nn.Module) -> dict[str, NetworkSpec]:
    """One network for each side of the VAE; none when it has weights that belong to neither."""
    children = dict(vae.named_children())
    placed = {name for names in _VAE_SIDES.values() for name in names}
    strays = any(_owns_tensors(child) for name, child in children.items() if name not in placed)
    own_tensors = next(vae.parameters(recurse=False), None) is not None or next(vae.buffers(recurse=False), None) is not None
    if strays or own_tensors or "encoder" not in children or "decoder" not in children:
        return {}
    return {
        network: NetworkSpec([Region(children[name], name=name) for name in names if name in children], span=None)
        for network, names in _VAE_SIDES.items()
    }


def _text_network(triggers: list[nn.Module], found: Harvest) -> NetworkSpec:
    """`triggers`: hooked modules that stand for one region. Stock hooks two for SD2, the encoder and the token embedding in
    it, because the encoder itself is never called: the innermost one is the first to run, and opens a pass with no end."""
    nested = [module for module in triggers if any(module is not other and module in set(other.modules()) for other in triggers)]
    trigger = nested[0] if nested else triggers[0]
    return NetworkSpec([Region(found.region_of(trigger), trigger=trigger)], span=trigger, open_ended=bool(nested))


def network_specs(found: Harvest) -> dict[str, NetworkSpec]:
    """The specs of everything stock hooked on a model; empty where the UNet is hooked neither block by block (`--lowvram`) nor as a
    whole (`--medvram`), which is left to stock altogether.

    Takes the VAE out of `found` when it cannot be described, so that stock goes on moving it.
    """
    hooked = [module for module, _, _ in found.hooked]
    root = getattr(getattr(found.model, "model", None), "diffusion_model", None)
    inside_root = set(root.modules()) - {root} if root is not None else set()
    blocks = [module for module in hooked if module in inside_root]
    wrapper = getattr(found.model, "model", None)
    if blocks:
        specs = {UNET: NetworkSpec([Region(module) for module in blocks], span=root)}
    elif wrapper in hooked and root is not None and _owns_tensors(root) and not _owns_tensors_beside(wrapper, root):
        # The same, but that the UNet's remaining parts, which stock then does not keep on the device, are the network's as well.
        specs = {UNET: NetworkSpec([Region(module) for module in blocks_of(root)], span=root, roots=[root])}
    else:
        return {}

    vae = found.vae
    named = {id(getattr(found.model, name, None)): name for name in ("depth_model", "embedder")}
    text_triggers: dict[nn.Module, list[nn.Module]] = {}
    for module in hooked:
        if module in inside_root or module is vae or module is wrapper:
            continue
        if id(module) in named:
            specs[named[id(module)]] = NetworkSpec([Region(module)], span=module)
        else:
            text_triggers.setdefault(found.region_of(module), []).append(module)
    for number, triggers in enumerate(text_triggers.values(), start=1):
        specs[TEXT if number == 1 else f"{TEXT}_{number}"] = _text_network(triggers, found)

    sides = vae_networks(vae) if vae is not None and set(found.vae_wraps) == set(VAE_METHODS) else {}
    if not sides:
        found.leave_vae_to_stock()
    specs.update(sides)
    return specs
