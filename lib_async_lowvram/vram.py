"""What device memory is used for while a network streams: residents, ring, activations, everybody else, and what stays free.

Problem: between two steps the device holds less than in the middle of one, and after a job nothing; a bar drawn of the present moment
would flicker and say little. So it shows the fullest moment of the network's passes: what its plan takes, the most that such passes
were seen to need beside the weights, and what others hold now.

Called by `status` under the mover's lock.
"""

from __future__ import annotations

from lib_async_lowvram.context import Context
from lib_async_lowvram.network import Network


def vram_of(context: Context, network: Network | None) -> dict[str, int | None]:
    """Bytes: "total", "resident", "ring", "activations", "others" (other programs, and what this one holds beside the networks), "free",
    "budget". The parts add up to the total; None where the device does not tell."""
    streams = context.streams
    plan = network.plan if network is not None else None
    budget = plan.budget_bytes if plan else context.budget(("", None))
    resident = sum(network.contents.units[unit].nbytes for unit in plan.resident) if plan else 0
    ring = plan.ring_bytes if plan else 0
    total = streams.total_memory()
    if total is None:
        return {"total": None, "resident": resident, "ring": ring, "activations": None, "others": None, "free": None, "budget": budget}
    needed = context.activations.most(network.name.partition("#")[0]) if network is not None else None
    # Beside the weights this process holds what computing needs right now, and what stays: the present one is counted once.
    now = streams.other_bytes()
    others = max(0, total - streams.free_memory() - streams.allocated_bytes - now)
    activations = min(max(needed or 0, now), max(0, total - resident - ring - others))
    free = max(0, total - resident - ring - activations - others)
    return {
        "total": total,
        "resident": resident,
        "ring": ring,
        "activations": activations if activations or needed is not None else None,
        "others": total - resident - ring - activations - free,  # less than counted where the plan was made when more was free
        "free": free,
        "budget": budget,
    }
