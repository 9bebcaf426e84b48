"""The mover's status as one JSON-ready dictionary: sums over its networks, figures of one (`shown_of`), and each network.

Sums are since the mover was made: what networks that are gone had counted stays in.

Called under the mover's lock, from any thread; reads only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib_async_lowvram import __version__
from lib_async_lowvram.context import Context
from lib_async_lowvram.core.stats import COUNTED
from lib_async_lowvram.network import Network
from lib_async_lowvram.vram import vram_of


def describe(context: Context, networks: Mapping[str, Network], current: Network | None, demoted: str, last_error: str) -> dict[str, Any]:
    """See the module. Keys as in DESIGN.md, Status. `efficiency` and the like are None until a steady pass was measured."""
    peak, learning_peak = context.peaks.read()
    each = {name: _network(context, network) for name, network in networks.items()}
    shown = shown_of(networks, current)
    figures = _figures(context, shown)
    sums = {key: getattr(context.gone, key) + sum(network[key] for network in each.values()) for key in COUNTED}
    streams = any(network["passes"] for network in each.values())
    return {
        "version": __version__,
        "state": "demoted" if demoted else "active" if streams else "learning",
        "reason": demoted or ("" if streams else "no network has finished its learning pass and a streamed pass yet"),
        "device": context.streams.name,
        "pinned_bytes": context.host.pinned_bytes,
        "pinned_limit_bytes": context.host.pinned_limit_bytes,
        **context.pinning.figures(),
        "host_bytes": context.host.host_bytes,
        "allocated_bytes": context.streams.allocated_bytes,
        "peak_weight_bytes": peak,
        "learning_peak_bytes": learning_peak,
        "placement_faults": context.checker.faults if context.checker is not None else None,
        "worst_stall": context.timeline.worst_stall(shown and shown.name),
        "vram": vram_of(context, shown),
        "network": shown.name if shown is not None else None,
        "in_use": current.name if current is not None else None,
        **sums,
        **figures,
        "networks": each,
        "last_error": last_error or (context.checker.last_fault if context.checker is not None else None) or "",
    }


def shown_of(networks: Mapping[str, Network], current: Network | None) -> Network | None:
    """The network that figures are about: the one used most of the model used last. A picture ends in the VAE, and what people want to
    know is the UNet's."""
    newest = current or max(networks.values(), key=lambda network: network.counters.began, default=None)
    if newest is None:
        return None
    model = newest.name.partition("#")[2]  # "unet#2": of the second model kept in memory
    alike = [network for name, network in networks.items() if name.partition("#")[2] == model]
    return max(alike, key=lambda network: (network.counters.passes, network is newest), default=newest)


def _network(context: Context, network: Network) -> dict[str, Any]:
    """`peak_activation_bytes`: the most that its passes were seen to need beside weights; None where that is not known."""
    counters, plan, units = network.counters, network.plan, network.contents.units
    return {
        "units": len(units),
        "peak_weight_bytes": context.peaks.of(network.name),
        "peak_activation_bytes": context.activations.most(network.name),
        "pinned_bytes": sum(unit.nbytes for unit in units if unit.in_file is None and context.host.is_pinned(unit.master)),
        "weight_bytes": sum(unit.nbytes for unit in network.contents.units),
        "budget_bytes": plan.budget_bytes if plan else 0,
        "resident_bytes": sum(network.contents.units[unit].nbytes for unit in plan.resident) if plan else 0,
        "ring_bytes": plan.ring_bytes if plan else 0,
        "stall_seconds": counters.stall_seconds,
        "pass_seconds": counters.pass_seconds,
        **{key: getattr(counters, key) for key in COUNTED},
    }


def _figures(context: Context, network: Network | None) -> dict[str, Any]:
    """Of this network: its plan against what was measured."""
    plan = network.plan if network is not None else None
    learned = network.learned if network is not None else None
    counters = network.counters if network is not None else None
    seconds = counters.pass_seconds if counters is not None else 0.0
    limit = plan.limit_seconds if plan else None
    best = plan.prediction.seconds if plan else None
    measured = bool(seconds and plan)
    return {
        "budget_bytes": plan.budget_bytes if plan else context.config.budget_bytes,
        "resident_bytes": sum(network.contents.units[unit].nbytes for unit in plan.resident) if plan else 0,
        "ring_bytes": plan.ring_bytes if plan else 0,
        "bandwidth_bytes_per_s": learned.bandwidth if learned else None,
        "streamed_bytes_per_pass": counters.streamed_bytes_last_pass if counters else 0,
        "pass_seconds": seconds or None,
        "stall_seconds": _stall(context, network, seconds),
        "limit_seconds": limit,
        "best_schedule_seconds": best,
        "efficiency": limit / seconds if measured else None,
        "schedule_efficiency": best / seconds if measured else None,
        "bound": ("copy" if plan.limit_seconds > learned.compute_seconds else "compute") if plan and learned else None,
    }


def _stall(context: Context, network: Network | None, pass_seconds: float) -> float | None:
    """Of the last pass. Where the device cannot tell without a host wait: what a pass takes beyond its computing."""
    if network is None:
        return 0.0
    if context.streams.knows_stalls:
        return network.counters.stall_seconds_last_pass
    if not pass_seconds or network.learned is None:
        return None
    return max(0.0, pass_seconds - network.learned.compute_seconds)
