"""Two running WebUIs, one with the extension and one without, asked for the same pictures.

`Pair.same` is the one judgement of the end-to-end tests of features: the pictures are the same bit for bit, the mover was at
work while they were made, and it wrote back, fetched again and packed anew as often as the case says, not more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from webui_client import Server

MIB = 1 << 20
COUNTERS = ("write_backs", "refetches", "adopted", "misses", "hits")
QUIET = {"write_backs": 0, "refetches": 0, "adopted": 0}
"""Nobody changes a weight."""


class Pair:
    """`budget`: "quarter" of the UNet, which makes it stream, or "automatic", which leaves everything resident here."""

    def __init__(self, url: str, stock_url: str, job: dict[str, Any]) -> None:
        self.ours, self.stock = Server(url), Server(stock_url)
        self.servers = (self.ours, self.stock)
        self.budget = ""
        self._job = job
        self._quarter_mb = 0

    def use_budget(self, budget: str) -> None:
        if budget == self.budget:
            return
        if not self._quarter_mb:
            self.ours.set_options(async_lowvram_enabled=True, async_lowvram_budget_mb=0)
            self.ours.pictures("txt2img", self._job)
            self._quarter_mb = max(1, self.ours.status()["networks"]["unet"]["weight_bytes"] // 4 // MIB)
        self.ours.set_options(async_lowvram_budget_mb={"quarter": self._quarter_mb, "automatic": 0}[budget])
        self.ours.pictures("txt2img", self._job)  # learned, and streams under this budget
        self.ours.pictures("txt2img", self._job)
        self.budget = budget

    # -- settings --------------------------------------------------------------------------------------------------------
    def set_options(self, **options: Any) -> None:
        for server in self.servers:
            server.set_options(**options)

    @contextmanager
    def options(self, *, back: dict[str, Any] | None = None, **options: Any) -> Iterator[None]:
        """On both servers, and back to what they were; `back` says what that was where the host does not tell: options of
        extensions are not among those it lists."""
        before = []
        for server in self.servers:
            known = {**server.get("/sdapi/v1/options"), **(back or {})}
            before.append({name: known[name] for name in options})
        self.set_options(**options)
        try:
            yield
        finally:
            for server, values in zip(self.servers, before, strict=True):
                server.set_options(**values)

    def flags(self, name: str) -> list[Path]:
        """A folder of each server, by its command line flag. Skips where the servers' disk is not ours."""
        folders = [Path(server.get("/sdapi/v1/cmd-flags")[name]) for server in self.servers]
        for folder in folders:
            if not folder.parent.is_dir():
                pytest.skip(f"the server's {name} is not on this machine")
        return folders

    def folders(self, name: str) -> list[Path]:
        """The same without doubles: both servers may share it."""
        return list(dict.fromkeys(self.flags(name)))

    def both(self, path: str, body: dict[str, Any]) -> list[Any]:
        return [server.post(path, body) for server in self.servers]

    def checkpoint(self) -> Path:
        """The file of the checkpoint in use."""
        title = self.ours.get("/sdapi/v1/options")["sd_model_checkpoint"].split(" [")[0]
        found = [model["filename"] for model in self.ours.get("/sdapi/v1/sd-models") if model["title"].split(" [")[0] == title]
        if not found or not Path(found[0]).is_file():
            pytest.skip("the server's checkpoint is not on this machine")
        return Path(found[0])

    # -- the judgement -----------------------------------------------------------------------------------------------------
    def same(
        self, name: str, job: dict[str, Any] | None = None, kind: str = "txt2img", *, expect: dict[str, Any] | None = QUIET
    ) -> list[str]:
        """`expect`: counter -> how much it grows, or a function that says whether that growth is right; None: not judged."""
        job = self._job if job is None else job
        before = self.ours.status()
        got = self.ours.pictures(kind, job)
        after = self.ours.status()
        wanted = self.stock.pictures(kind, job)
        self.judge(name, got, wanted, before, after, expect=expect)
        return got

    def judge(self, name: str, got: Any, wanted: Any, before: dict, after: dict, *, expect: dict[str, Any] | None = QUIET) -> None:
        grown = growth(before, after)
        print(f"\n{self.budget or 'as set'} | {name} | ours {_words(got)} | stock {_words(wanted)} | {grown}")
        assert got, name
        assert got == wanted, name
        self.check_worked(before, after)
        for counter, right in (expect or {}).items():
            assert right(grown[counter]) if callable(right) else grown[counter] == right, (name, counter, grown)

    def check_worked(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """The mover moved; it kept its promises; nothing is left on the device."""
        assert after["state"] == "active", after["reason"]
        assert after["passes"] > before["passes"]
        self.check_idle(after)
        unet = after["networks"]["unet"]
        if self.budget == "quarter":
            assert unet["passes"] > before["networks"].get("unet", {"passes": 0})["passes"]
            assert after["streamed_bytes"] > before["streamed_bytes"]
            assert after["hits"] > before["hits"]
            assert unet["resident_bytes"] + unet["ring_bytes"] <= unet["budget_bytes"]
        if self.budget == "automatic":
            assert unet["resident_bytes"] == unet["weight_bytes"] > 0

    def check_idle(self, status: dict[str, Any] | None = None) -> None:
        """Between jobs: no fault was seen, and nothing is on the device."""
        status = status or self.ours.status()
        if status["device"] == "simulated":
            assert status["placement_faults"] is not None, "start the server with ASYNC_LOWVRAM_CHECK_PLACEMENT=1"
        assert status["placement_faults"] in (0, None), status["last_error"]
        assert status["allocated_bytes"] == 0


def growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Of the counters; a mover that was opened anew in between starts at nothing."""
    return {name: after[name] - before[name] if after[name] >= before[name] else after[name] for name in COUNTERS}


def _words(hashes: Any) -> str:
    return " ".join(hashes) if isinstance(hashes, list) else str(hashes)
