"""Memory ran out in the middle of a pass: the network gives up its residents, so that the pass can be tried again.

Problem: the budget is what was free when the plan was made, less what computing was thought to need. It may need more: a larger
picture, an extension, another program that has taken memory meanwhile. Stock, with one block on the device, would often have had
room where a resident set leaves none. Whoever can repeat the pass (`webui.retry`) therefore asks for less first.

After `shed` the network holds nothing, and takes no more than the least budget when it is entered again - a ring for two of its
largest units, and what cannot stream - until it is left (`Planning.most_bytes`). The values of weights are as they were.

What was fetched ahead for another network (`ahead`) is given up first.

Called by `AsyncModelMover.shed` under its lock, on the thread whose pass has just failed; blocks the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lib_async_lowvram.device.streams import align
from lib_async_lowvram.log import logger

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


def shed(network: Network) -> int:
    """Bytes by which the network will hold less from now on than its plan said, and what was given up beside it. 0 where that would be
    nothing - it has learned nothing yet, and moves as stock does, or it keeps to the least already; then nothing else is done. An error
    on the way is met as at the end of any pass, and raised only if weights were lost by it."""
    units, planning = network.contents.units, network.planning
    fetched = network.context.ahead.drop()
    if planning.learned is None or planning.plan is None:
        return fetched
    plan, least = planning.plan, planning.least_budget(units)
    held = plan.ring_bytes + sum(align(units[unit].nbytes) for unit in plan.resident) + planning.learned.buffer_bytes
    if held <= least:
        return fetched
    network.leave()
    planning.most_bytes = least  # until it is left for good: it stays the mover's current one
    network.counters.sheds += 1
    logger.debug("%s: out of memory; %d MB are given up, and %d MB kept until it is left", network.name, held - least >> 20, least >> 20)
    return fetched + held - least
