"""The pair of servers for the life cycle's end-to-end tests: one WebUI with the extension, one without, driven alike.

Problem: every case is "do the same to both, compare every picture, and know that the mover was at work meanwhile".

The checkpoints are found, not named: those without a config file of their own share the host's and are switched in place;
one with its own is another architecture. VAEs are those in the models folder.
"""

from __future__ import annotations

import urllib.error
from collections.abc import Iterable
from typing import Any

from webui_client import Background, Server

MIB = 1 << 20
COUNTERS = ("passes", "learning_passes", "hits", "misses", "refetches", "write_backs", "adopted", "streamed_bytes")
SHOWN = ("learning_passes", "write_backs", "refetches", "adopted")
HOST_DEFAULTS = {
    "sd_checkpoints_limit": 1,
    "sd_checkpoints_keep_in_cpu": True,
    "sd_checkpoint_cache": 0,
    "sd_vae_checkpoint_cache": 0,
    "sd_vae": "Automatic",
    "hires_fix_refiner_pass": "second pass",
    "batch_cond_uncond": True,
}
OUR_DEFAULTS = {"async_lowvram_enabled": True, "async_lowvram_lookahead_mb": 0, "async_lowvram_pinned_mb": 0}
JOB = {
    "prompt": "a lighthouse on a rock, waves, evening light",
    "negative_prompt": "blurry",
    "seed": 4321,
    "steps": 4,
    "width": 128,
    "height": 128,
    "cfg_scale": 7,
    "sampler_name": "Euler a",
    "save_images": False,
    "do_not_save_grid": True,
    "do_not_save_samples": True,
}


def counted(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """What the mover counted between two statuses, models that came and went included; a new mover counts from nothing."""
    restarted = any(after[key] < before.get(key, 0) for key in COUNTERS)
    return {key: after[key] - (0 if restarted else before.get(key, 0)) for key in COUNTERS}


def own_threads(found: dict[str, Any]) -> int:
    """Threads of a probed process, but for those the HTTP server keeps for requests, as many as once came together."""
    return found["threads"] - found["python_threads"].get("AnyIO worker thread", 0)


def check_idle(status: dict[str, Any]) -> None:
    """What must hold between two jobs."""
    assert status["state"] == "active", (status["state"], status["reason"])
    if status["device"] == "simulated":
        assert status["placement_faults"] is not None, "start the server with ASYNC_LOWVRAM_CHECK_PLACEMENT=1"
    assert status["placement_faults"] in (0, None), status["last_error"]
    assert not status["last_error"], status["last_error"]
    assert status["allocated_bytes"] == 0 and status["in_use"] is None
    assert status["pinned_bytes"] <= status["pinned_limit_bytes"]
    for name, network in status["networks"].items():
        if network["budget_bytes"]:
            assert network["resident_bytes"] + network["ring_bytes"] <= network["budget_bytes"], name


class Pair:
    """Both servers. `base`: the checkpoint that tests start from; `same`: others that share its config file; `other`: of
    another architecture; `vaes`: by name."""

    def __init__(self, url: str, stock_url: str) -> None:
        self.ours, self.stock = Server(url), Server(stock_url)
        models = self.ours.get("/sdapi/v1/sd-models")
        shared = sorted(model["title"] for model in models if model["config"] is None)
        self.base, self.same = next(iter(shared), None), shared[1:]
        self.other = [model["title"] for model in models if model["config"] is not None]
        self.vaes = sorted(vae["model_name"] for vae in self.ours.get("/sdapi/v1/sd-vae"))
        self.automatic = True

    def both(self, **options: Any) -> None:
        """The same options, in the same order, on both servers."""
        for server in (self.ours, self.stock):
            server.set_options(**options)

    def as_found(self, budget_mb: int | None = None) -> None:
        """Host settings as shipped, the base checkpoint, and our budget: a quarter of the UNet unless given (0: automatic)."""
        self.both(**HOST_DEFAULTS)
        self.both(sd_model_checkpoint=self.base)
        self.ours.set_options(**OUR_DEFAULTS, async_lowvram_budget_mb=self.quarter() if budget_mb is None else budget_mb)
        self.automatic = budget_mb == 0

    def quarter(self) -> int:
        """MB: of the smallest UNet there is ("unet", or "unet#2" where a first one has gone)."""
        sizes = self._unets()
        if not sizes:
            self.ours.set_options(**OUR_DEFAULTS)
            self.ours.pictures("txt2img", JOB)
            sizes = self._unets()
        return max(1, min(sizes) // 4 // MIB)

    def _unets(self) -> list[int]:
        networks = self.ours.status().get("networks", {})
        return [network["weight_bytes"] for name, network in networks.items() if name.startswith("unet")]

    def pictures(self, job: dict[str, Any], kind: str = "txt2img") -> tuple[list[str], list[str]]:
        """Of the same job on both, side by side."""
        beside = Background(self.stock, kind, job)
        got = self.ours.pictures(kind, job)
        return got, beside.result()

    def check(self, case: str, job: dict[str, Any] | None = None, kind: str = "txt2img", **expected: int) -> dict[str, int]:
        """One job on both: the same pictures, by a mover that streamed, with every promise of the status kept.

        `expected`: counters and what they must have grown by. Returns what was counted.
        """
        before = self.ours.status()
        got, wanted = self.pictures(JOB if job is None else job, kind)
        after = self.ours.status()
        grown = counted(before, after)
        self.tell(case, got, wanted, grown)
        assert got == wanted, case
        assert got
        check_idle(after)
        assert grown["passes"] > 0 and grown["streamed_bytes"] > 0, (case, grown)
        assert grown["hits"] > 0 or self.automatic, (case, grown)  # under an automatic budget everything may be resident
        unexpected = {key: (grown[key], value) for key, value in expected.items() if grown[key] != value}
        assert not unexpected, (case, unexpected)
        return grown

    def tell(self, case: str, got: Iterable[str], wanted: Iterable[str], grown: dict[str, int]) -> None:
        figures = " ".join(f"{key}={grown[key]}" for key in (*SHOWN, "hits", "misses"))
        print(f"\n{case}: ours {' '.join(got)}  stock {' '.join(wanted)}  {figures}")


def outcome(server: Server, job: dict[str, Any], kind: str = "txt2img") -> list[str] | str:
    """The pictures of a job, or what the host says of its failure."""
    try:
        return server.pictures(kind, job)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code} {error.read().decode(errors='replace')[:300]}"
