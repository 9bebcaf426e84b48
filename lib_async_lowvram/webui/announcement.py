"""The console line at start. Pure."""

from __future__ import annotations

from lib_async_lowvram.config import OffloadConfig
from lib_async_lowvram.webui.host import Host

SWITCHED_OFF = "switched off in Settings"


def describe(host: Host, config: OffloadConfig | None) -> str:
    """Device, budget, what will be done. `config`: None when switched off."""
    on = f"{host.device_name}, WebUI {host.version}{' (best effort)' if host.best_effort else ''}"
    if config is None:
        return f"{on}; {SWITCHED_OFF}, stock --lowvram moves the weights"
    sizes = [
        f"{label} {f'{size >> 20} MB' if size else 'automatic'}"
        for label, size in (("budget for weights", config.budget_bytes), ("lookahead", config.lookahead_bytes))
    ]
    return f"{on}; {', '.join(sizes)}; text encoder, UNet and VAE will travel while the device computes"
