"""After an error in the middle of our work: every weight back on the host, whatever state anything claims to be in.

Problem: a bug in the mover - an illegal transition, a table that lacks an entry, an assertion - is found in the middle of a
pass, when some weights are on the device, others on their way, and the bookkeeping says what is not so. The host's picture must
not pay for it (I6). A device that is out of memory, a copy that fails, an interrupt leave things just as unfinished, and the next
picture must not pay for that. What can still be trusted are the parameters themselves: each points at its master, or at the device
memory that its unit was bound to, or at something that somebody put there.

So: wait for the device, copy what was changed and not yet written back, point everything at the masters, and give all memory
back; nothing here looks at a state or makes a transition. What fails on the way is told and the rest is still done.

Which errors are ours (`is_ours`): a device that is out of memory, or broken, raises RuntimeErrors of torch's, which stock would
have raised as well and which go to the host (`network.Network.met`). Called by `network` under the mover's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lib_async_lowvram.core.states import IllegalTransition, UnitState
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.log import logger

if TYPE_CHECKING:
    from lib_async_lowvram.contents import Contents
    from lib_async_lowvram.device.streams import Streams
    from lib_async_lowvram.network import Network


def is_ours(error: BaseException) -> bool:
    """Whether `error` means that the mover is wrong, not the device, the memory or the user's patience."""
    return isinstance(error, IllegalTransition) or (
        isinstance(error, Exception) and not isinstance(error, (RuntimeError, MemoryError, OSError, torch.cuda.OutOfMemoryError))
    )


def in_one_line(error: BaseException) -> str:
    """Type and first line of the message."""
    text = str(error)
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def attempt(what: str, action: Callable[[], object]) -> str:
    """Do one part of the clearing up; the rest is done all the same when it fails. Then, what failed, in one line; else ""."""
    try:
        action()
    except Exception as error:
        if is_ours(error):
            logger.exception("after an error, while %s", what)
        return f"{what}: {in_one_line(error)}"
    return ""


def abandon(network: Network) -> list[str]:
    """Weights home, device memory given back, units' hooks taken off, whatever has gone wrong. The weights that could not be
    brought home, and why; usually none."""
    streams, contents = network.context.streams, network.contents
    with network.judged(False):
        attempt("calling off staged copies", network.context.stager.settle)
        holding = [each for each in (network.streaming, network.regions, network.left_standing) if each is not None]
        network.streaming = network.regions = network.left_standing = None
        for stream in (*(each.consumer for each in holding), streams.current_stream(), streams.onload_stream, streams.offload_stream):
            attempt("waiting for the device", lambda stream=stream: streams.synchronize(streams.record(stream)))
        blocks = [(block, each.fences) for each in holding for block in each.blocks]
        problems = [
            attempt("saving changed weights", lambda master=master, memory=memory: master.copy_(memory))
            for each in holding
            for master, memory, written in each.unsaved
            if streams.failed(written)  # then nobody has overwritten what it should have saved
        ]
        for unit in contents.units:
            problems.append(attempt(f"bringing {unit.name} to the host", lambda unit=unit: _bring_home(unit, contents, streams)))
            unit.state = UnitState.HOST
            unit.unbind()
            unit.pending = unit.depth = 0
            unit.copied = unit.written = None
            unit.dirty = False
        for each in holding:
            problems.append(attempt("bringing buffers to the host", each.abandon))
        for block, fences in blocks:
            attempt("giving memory back", lambda block=block, fences=fences: streams.free(block, fences))
        attempt("giving back what was kept", lambda: network.kept.reduce_to(()))
        attempt("giving back what was fetched for others", network.context.ahead.drop)
        attempt("taking hooks off", network.hooks.units_off)
    network.context.peaks.learning(False)
    problems = [problem for problem in problems if problem]
    for problem in problems[:3]:
        logger.error("%s: after an error, while %s", network.name, problem)
    return problems


def _bring_home(unit: Unit, contents: Contents, streams: Streams) -> None:
    if unit.memory is None:
        return  # its parameters point at the master, or at what somebody put there: adopted at the next use
    held = unit.held()
    published = [(parameter, entry) for parameter, entry in held or () if parameter is not None and entry.is_published(parameter)]
    at_home = [entry for parameter, entry in held or () if parameter is not None and entry.looks_like(parameter, entry.master_ptr)]
    if held is None or len(published) + len(at_home) < len(held):
        contents.adopt(unit)  # somebody put other tensors there: reads what is there now, wherever that is
        return
    if published and (unit.dirty or unit.suspect or any(parameter._version != entry.version for parameter, entry in published)):
        unit.leave_file()
        streams.copy(unit.master, unit.memory[: unit.nbytes], streams.offload_stream)
        streams.synchronize(streams.record(streams.offload_stream))
    for parameter, entry in published:
        parameter.data = entry.master
        entry.version = parameter._version
