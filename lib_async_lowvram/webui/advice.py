"""What the figures mean for a user: sentences that say what to change, or that there is nothing to change.

Problem: a dozen figures answer "why is it no faster?" only for who knows how offloading works. So each situation that can be told from
them has one sentence with what to do, the most useful first.

Sentences are templates, so that they can be translated before their values are filled in (`fill`): `{"id", "text", "values"}`. Pure:
figures in, sentences out; a figure that is not known (None) never makes one. Called by `status` on threads of the HTTP server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MB = 1 << 20

STEP_BYTES = 256 * MB
"""Budgets are suggested in steps of this."""

MOST_BYTES = 2048 * MB
"""No larger step is suggested at once."""

WORTHWHILE_SECONDS, WORTHWHILE_SHARE = 0.002, 0.02
"""Of a pass; below both, a change is not worth a sentence."""

SPARE_BYTES = 512 * MB
"""Device memory that stays free when more budget is suggested."""

FAR_BEHIND = 0.5
"""Schedule efficiency below which something outside the schedule holds passes up."""

BEHIND = 0.85
"""The same, where nothing is known to be wrong."""

NEARLY_FULL = 0.05
"""Share of device memory that is free, below which the driver of Windows may have moved some to main memory."""

TEXTS = {
    "restart": "The extension was updated: restart the WebUI to use the new version.",
    "gave_way": "It gave way to stock moving. Switch the first option off and on, or restart the WebUI, to try again; if it happens again, "
    "copy the report and open an issue.",
    "learning": "Make one picture: the first step of each network is watched, from the second one on weights travel ahead.",
    "sysmem_fallback": "Steps take {times} times as long as planned while VRAM is full: Windows may be using main memory in its place. "
    "Set “CUDA - Sysmem Fallback Policy” to “Prefer No Sysmem Fallback” in the NVIDIA Control Panel, or lower the VRAM budget.",
    "out_of_memory": "VRAM ran out {count} times and steps had to be repeated: lower “VRAM budget for weights” to {mb} MB.",
    "cond_uncond": "“Batch cond/uncond” is off: every step moves the weights twice, about {ms} ms of it for nothing. "
    "Switch it on in Settings, Optimizations.",
    "unpinned": "{mb} MB of weights could not be locked in main memory and travel more slowly: {how}.",
    "slow_disk": "Disk-bound: weights come from disk at {disk} GB/s, and the bus carries {link} GB/s. With enough main memory, switch "
    "“Keep weights on disk” off.",
    "more_budget": "Copy-bound: {mb} MB more budget would save about {ms} ms per step.",
    "others": "Copy-bound: other programs hold {mb} MB of VRAM; without them a step could take about {ms} ms less.",
    "hand_set_lookahead": "Copies come late by {ms} ms per step with a lookahead buffer set to {mb} MB: 0 lets the extension choose.",
    "larger_batch": "Copy-bound: a step takes as long as its copies, so a batch twice as large would take about {percent}% longer, "
    "not 100%.",
    "slicing": "{method} attention slices by free memory, so pictures depend on how much happens to be free: choose sdp-no-mem in "
    "Settings, Optimizations, for pictures that do not, and for a larger automatic budget.",
    "held_up": "Steps take {ms} ms where {planned} ms were planned, and not for copies: other programs on the GPU or the CPU may hold "
    "them up.",
    "compute_bound": "Compute-bound: weights arrive in time, {percent}% of the fastest possible. Nothing to change.",
    "at_best": "At {percent}% of the best schedule for this budget. Nothing to change.",
}
"""id -> template. Localisation files have these texts as keys."""

PIN_HOW = {
    "limit": "raise “Pinned memory limit”",
    "refused": "close other programs, or restart the computer",
}


@dataclass(frozen=True)
class Host:
    """What the figures do not tell. Bytes.

    Attributes:
        budget_bytes, lookahead_bytes: as set by hand; 0: automatic.
        batches_cond_uncond: prompt and negative prompt in one pass; None where the host does not say.
        slicing: the attention that slices by free memory, or "".
        windows: whether the driver may put device memory into main memory. restart: the files are newer than the library in memory.
    """

    budget_bytes: int = 0
    lookahead_bytes: int = 0
    batches_cond_uncond: bool | None = None
    slicing: str = ""
    windows: bool = False
    restart: bool = False


def fill(advice: Mapping[str, Any]) -> str:
    """The sentence with its values."""
    return str(advice["text"]).format(**advice["values"])


def advise(status: Mapping[str, Any], host: Host) -> list[dict[str, Any]]:
    """Sentences for this status (see `status.complete`), the most useful first; none where the extension has nothing to do."""
    return [{"id": name, "text": TEXTS[name], "values": values} for name, values in _situations(status, host)]


def _situations(status: Mapping[str, Any], host: Host) -> Iterator[tuple[str, dict[str, Any]]]:
    if host.restart:
        yield "restart", {}
    state = status.get("state")
    if state == "demoted":
        yield "gave_way", {}
    if state == "learning":
        yield "learning", {}
    if state != "active":
        return
    troubles = list(_troubles(status, host))
    yield from troubles
    changes = list(_changes(status, host))
    yield from changes
    if host.slicing:
        yield "slicing", {"method": host.slicing}
    if not troubles and not changes:
        yield from _fine(status)


def _troubles(status: Mapping[str, Any], host: Host) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is wrong."""
    seconds, best = status.get("pass_seconds"), status.get("best_schedule_seconds")
    vram = status.get("vram") or {}
    total, free = vram.get("total"), vram.get("free")
    full = total and free is not None and free < NEARLY_FULL * total
    if host.windows and full and seconds and best and best < FAR_BEHIND * seconds:
        yield "sysmem_fallback", {"times": round(seconds / best, 1)}
    failed = status.get("retries") or 0
    budget = status.get("budget_bytes") or 0
    if failed and budget > 2 * STEP_BYTES:
        yield "out_of_memory", {"count": failed, "mb": (budget - STEP_BYTES) // MB}
    unpinned = status.get("unpinned_bytes") or 0
    if unpinned >= STEP_BYTES // 8 and (status.get("streamed_bytes_per_pass") or 0) > 0 and not _on_disk(status):
        limit, pinned = status.get("pinned_limit_bytes") or 0, status.get("pinned_bytes") or 0
        at_limit = bool(limit) and pinned + unpinned > limit
        yield "unpinned", {"mb": round(unpinned / MB), "how": PIN_HOW["limit" if at_limit else "refused"]}


def _on_disk(status: Mapping[str, Any]) -> bool:
    return bool((status.get("on_disk") or {}).get("in_file_bytes"))


def _changes(status: Mapping[str, Any], host: Host) -> Iterator[tuple[str, dict[str, Any]]]:
    """What would be faster."""
    seconds = status.get("pass_seconds")
    streamed = status.get("streamed_bytes_per_pass") or 0
    rate = status.get("bandwidth_bytes_per_s")
    if not seconds or not streamed or not rate:
        return
    copying = streamed / rate
    if host.batches_cond_uncond is False and worthwhile(min(copying, seconds), seconds):
        yield "cond_uncond", {"ms": _ms(min(copying, seconds))}
    disk = (status.get("disk") or {}).get("bytes_per_s")
    if disk and disk < rate / 1.5 and status.get("stall_seconds"):
        yield "slow_disk", {"disk": round(disk / 1e9, 1), "link": round(rate / 1e9, 1)}
    late = _late(status)
    if not worthwhile(late, seconds):
        return
    vram = status.get("vram") or {}
    free, others = vram.get("free"), vram.get("others")
    if host.budget_bytes and free is not None and free - SPARE_BYTES >= STEP_BYTES:
        more = min(MOST_BYTES, _up(late * rate), (free - SPARE_BYTES) // STEP_BYTES * STEP_BYTES)
        yield "more_budget", {"mb": more // MB, "ms": _ms(min(late, more / rate))}
    elif not host.budget_bytes and others is not None and others >= STEP_BYTES:
        yield "others", {"mb": others // MB, "ms": _ms(min(late, others / rate))}
    best = status.get("best_schedule_seconds")
    if host.lookahead_bytes and best and worthwhile(best - (status.get("limit_seconds") or best), seconds):
        yield "hand_set_lookahead", {"mb": host.lookahead_bytes // MB, "ms": _ms(late)}
    if status.get("bound") == "copy":
        computing = max(0.0, seconds - late)
        yield "larger_batch", {"percent": round(100 * max(0.0, 2 * computing - seconds) / seconds)}


def _late(status: Mapping[str, Any]) -> float:
    """Seconds per pass that computing waits for copies."""
    stalled = status.get("stall_seconds")
    return max(0.0, stalled) if stalled is not None else 0.0


def _fine(status: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    best, efficiency = status.get("schedule_efficiency"), status.get("efficiency")
    if best and best < BEHIND and status.get("pass_seconds") and status.get("best_schedule_seconds"):
        yield "held_up", {"ms": _ms(status["pass_seconds"]), "planned": _ms(status["best_schedule_seconds"])}
    elif status.get("bound") == "compute" and efficiency:
        yield "compute_bound", {"percent": round(100 * min(1.0, efficiency))}
    elif best:
        yield "at_best", {"percent": round(100 * min(1.0, best))}


def worthwhile(saved_seconds: float, pass_seconds: float) -> bool:
    """Whether so much less per pass is worth a sentence."""
    return saved_seconds >= max(WORTHWHILE_SECONDS, WORTHWHILE_SHARE * pass_seconds)


def _up(nbytes: float) -> int:
    """To the next step."""
    return max(1, -(-int(nbytes) // STEP_BYTES)) * STEP_BYTES


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1e3))
