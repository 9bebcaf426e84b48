"""JSON as the server sends it: one working status, and the others as changes of it."""

from __future__ import annotations

from typing import Any

MB = 1 << 20
GB = 1 << 30

ACTIVE: dict[str, Any] = {
    "schema": 1,
    "version": "1.0.0",
    "state": "active",
    "reason": "",
    "generating": False,
    "device": "NVIDIA GeForce GTX 1650",
    "network": "unet",
    "budget_bytes": 1200 * MB,
    "resident_bytes": 700 * MB,
    "ring_bytes": 180 * MB,
    "pinned_bytes": 1640 * MB,
    "pinned_limit_bytes": 9830 * MB,
    "host_bytes": 1720 * MB,
    "passes": 40,
    "streamed_bytes_per_pass": 940 * MB,
    "bandwidth_bytes_per_s": 11.8e9,
    "pass_seconds": 0.412,
    "stall_seconds": 0.0123,
    "limit_seconds": 0.391,
    "best_schedule_seconds": 0.4,
    "efficiency": 0.949,
    "schedule_efficiency": 0.971,
    "bound": "compute",
    "stock_pass_seconds": 0.98,
    "worst_stall": {"unit": "unet.input_blocks.1.0.in_layers.2", "seconds": 0.0012},
    "vram": {
        "total": 4096 * MB,
        "resident": 700 * MB,
        "ring": 180 * MB,
        "activations": 900 * MB,
        "others": 600 * MB,
        "free": 1716 * MB,
        "budget": 1200 * MB,
    },
    "disk": None,
    "advices": [
        {
            "id": "more_budget",
            "text": "Copy-bound: {mb} MB more budget would save about {ms} ms per step.",
            "values": {"mb": 300, "ms": 60},
        },
        {"id": "cond_uncond", "text": "“Batch cond/uncond” is off: every step moves the weights twice.", "values": {}},
    ],
    "advice": "Copy-bound: 300 MB more budget would save about 60 ms per step.",
    "messages": [
        {"at": 1700000200, "level": "warning", "text": "Memory ran out: the budget is 256 MB less now.", "count": 2},
        {"at": 1700000100, "level": "error", "text": "A pass was repeated.", "count": 1},
        {"at": 1700000000, "level": "info", "text": "Took over 3 networks.", "count": 1},
    ],
    "restart": "",
    "preview": {"decoded": 8, "skipped": 1, "decode_seconds": 0.4, "errors": 0, "peak_weight_bytes": 0},
    "trial": {"state": "idle", "progress": 0.0, "reason": "", "result": None},
    "large": None,
    "last_error": "",
    "placement_faults": None,
    "networks": {"unet": {"passes": 40}},
    "memory": {},
    **dict.fromkeys(
        """adopted allocated_bytes hits host_waits learning_passes learning_peak_bytes misses peak_weight_bytes refetches retries
        retries_failed sheds streamed_bytes write_backs""".split(),
        0,
    ),
}

UNKNOWN = dict.fromkeys(
    """pass_seconds stall_seconds limit_seconds best_schedule_seconds efficiency schedule_efficiency bound stock_pass_seconds worst_stall
    bandwidth_bytes_per_s""".split()
)

RESULT = {
    "passes": 6,
    "shape": "512x512, batch 2",
    "stock_seconds": 0.98,
    "async_seconds": 0.412,
    "limit_seconds": 0.391,
    "ratio": 2.3786,
    "equal": True,
}


def active(**changes: Any) -> dict[str, Any]:
    return {**ACTIVE, **changes}


def learning(**changes: Any) -> dict[str, Any]:
    """Nothing measured yet: what can be unknown is null."""
    vram = {"total": None, "resident": 0, "ring": 0, "activations": None, "others": None, "free": None, "budget": 0}
    return active(
        **{
            **UNKNOWN,
            "state": "learning",
            "reason": "no network has finished its learning pass and a streamed pass yet",
            "vram": vram,
            "streamed_bytes_per_pass": 0,
            "preview": {"decoded": 0, "skipped": 0, "decode_seconds": 0.0, "errors": 0, "peak_weight_bytes": 0},
            "advices": [],
            "advice": "",
            "host_bytes": 0,
            "pinned_bytes": 0,
            "messages": [],
            **changes,
        }
    )


def standing_down(**changes: Any) -> dict[str, Any]:
    return learning(**{"state": "standing_down", "reason": "the WebUI was started without --lowvram", **changes})


def trial(state: str, progress: float = 0.0, reason: str = "", result: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"state": state, "progress": progress, "reason": reason, "result": result}


def timeline() -> dict[str, Any]:
    """Ten units of 40 ms, copies one ahead, two stalls, one preview. Seconds from the pass's start."""
    spans = []
    at, link = 0.0, -0.03
    for number in range(10):
        name = f"unet.input_blocks.{number}.0.in_layers.2"
        spans.append({"lane": "copy", "name": name, "start": link, "end": link + 0.036, "bytes": (80 + number) * MB})
        link += 0.038
        if number in (3, 7):
            wait = 0.004 if number == 3 else 0.008
            spans.append({"lane": "stall", "name": name, "start": at, "end": at + wait, "bytes": 0})
            at += wait
        spans.append({"lane": "compute", "name": name, "start": at, "end": at + 0.038, "bytes": 0})
        at += 0.0385
    spans.append({"lane": "preview", "name": "vae", "start": 0.1, "end": 0.2, "bytes": 20 * MB})
    return {"schema": 1, "network": "unet", "seconds": round(at, 6), "spans": spans, "age_seconds": 2.4}
