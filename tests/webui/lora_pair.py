"""Two servers side by side for the LoRA tests: the same job on both, one line with hashes and counters, nothing unproved.

Problem: pictures alone do not show that the mover was at work, and counters alone do not show that they were right. `Pair.run`
runs a job on the server with the extension and on the stock one, holds the pictures against each other and the promises of
the mover against its status, and returns what each network's counters grew by.

Expected write-backs follow from which layers a network file patches: a change writes back each unit that held a patch or gets
one, once. The rest of what the built-in extension restores, nobody has changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make_networks import UNET, NetworkFile
from PIL import Image
from webui_client import Background, Server, encode

PLAIN = {
    "prompt": "a lighthouse on a rock",
    "negative_prompt": "blurry",
    "seed": 5,
    "steps": 3,
    "width": 128,
    "height": 128,
    "cfg_scale": 7,
    "sampler_name": "Euler a",
    "save_images": False,
    "do_not_save_grid": True,
    "do_not_save_samples": True,
}
COUNTERS = ("passes", "learning_passes", "hits", "misses", "refetches", "write_backs", "adopted", "streamed_bytes")
NETWORKS = ("text", "unet")


def job(networks: str = "", **changes: Any) -> dict[str, Any]:
    """A small txt2img job; `networks` as in a prompt: "<lora:e2e-one:1>"."""
    prompt = changes.pop("prompt", PLAIN["prompt"])
    return {**PLAIN, **changes, "prompt": prompt + networks}


def img2img(networks: str = "", **changes: Any) -> dict[str, Any]:
    picture = Image.new("RGB", (PLAIN["width"], PLAIN["height"]))
    picture.putdata([(2 * x, 2 * y, (x * y) % 256) for y in range(picture.height) for x in range(picture.width)])
    return {**job(networks, **changes), "init_images": [encode(picture)], "denoising_strength": 0.75, "steps": 6}


@dataclass(frozen=True)
class Outcome:
    """The pictures, and what each network's counters grew by."""

    pictures: list[str]
    grew: dict[str, dict[str, int]]

    def write_backs(self) -> dict[str, int]:
        return {name: self.grew[name]["write_backs"] for name in NETWORKS}


class Pair:
    """See the module.

    Attributes:
        files: the network files both servers have. streamed: ours is under a budget far below the weights.
        checkpoint: the one both had loaded; others: those they could load, of the same config file first. same_config: those of
            them that have it: the network files fit them, whatever they do to others.
        plain: pictures without any network, for the fixtures.
    """

    def __init__(self, ours: Server, stock: Server) -> None:
        self.ours = ours
        self.stock = stock
        self.medvram = bool(ours.get("/sdapi/v1/cmd-flags").get("medvram"))
        self.files: dict[str, NetworkFile] = {}
        self.streamed = True
        self.plain: dict[bool, list[str]] = {}
        loaded = stock.get("/sdapi/v1/options")["sd_model_checkpoint"].split(" [")[0]
        models = {model["title"].split(" [")[0]: model for model in stock.get("/sdapi/v1/sd-models")}
        present = models.pop(loaded)
        self.checkpoint = loaded
        self.checkpoint_file = Path(present["filename"])
        self.same_config = {title for title in models if models[title]["config"] == present["config"]}
        self.others = sorted(models, key=lambda title: (models[title]["config"] != present["config"], title))

    def both(self) -> tuple[Server, Server]:
        return self.ours, self.stock

    def set_options(self, **options: Any) -> None:
        for server in self.both():
            server.set_options(**options)

    def post(self, path: str) -> None:
        for server in self.both():
            server.post(path, {})

    # -- jobs --------------------------------------------------------------------------------------------------------------
    def run(self, name: str, what: dict[str, Any], kind: str = "txt2img", *, managed: bool = True, rebuilt: bool = False) -> Outcome:
        """The same job on both; fails when the pictures differ. `managed`: the mover has to have been at work. `rebuilt`: the
        job ends with another model than it began with, whose networks have counted from zero."""
        before = {"networks": {}} if rebuilt else self.ours.status()
        got = self.ours.pictures(kind, what)
        after = self.ours.status()
        wanted = self.stock.pictures(kind, what)
        outcome = Outcome(got, growth(before, after))
        self.report(name, got, wanted, outcome.grew)
        assert got and got == wanted, name
        if managed:
            self.check(after, outcome)
        return outcome

    def cut_short(self, name: str, what: dict[str, Any], path: str, step: int = 1) -> None:
        """Start the job on each server and end it from outside once it has sampled `step` steps."""
        for server in self.both():
            running = Background(server, "txt2img", {**what, "steps": 40})
            server.wait_for_step(step, running.thread)
            server.post(path, {})
            running.result()
        print(f"\n{name}: ended after at least {step} steps")

    def report(self, name: str, got: list[str], wanted: list[str], grew: dict[str, dict[str, int]]) -> None:
        counts = "; ".join(
            f"{network} " + " ".join(f"{key} {grew[network][key]}" for key in ("write_backs", "refetches", "adopted", "passes"))
            for network in NETWORKS
            if network in grew
        )
        print(f"\n[{'streamed' if self.streamed else 'resident'}] {name}: ours {' '.join(got)}  stock {' '.join(wanted)}\n    {counts}")

    def check(self, status: dict[str, Any], outcome: Outcome) -> None:
        """Active, on the right device, nothing left there, and really moving weights."""
        assert status["state"] == "active", status["reason"]
        if status["device"] == "simulated":
            assert status["placement_faults"] is not None, "start the server with ASYNC_LOWVRAM_CHECK_PLACEMENT=1"
        assert status["placement_faults"] in (0, None), status["last_error"]
        assert status["allocated_bytes"] == 0
        unet = outcome.grew["unet"]
        assert unet["passes"] + unet["learning_passes"] > 0
        assert unet["streamed_bytes"] > 0
        plan = status["networks"]["unet"]
        if self.streamed:
            assert unet["hits"] > 0
            assert plan["resident_bytes"] + plan["ring_bytes"] <= plan["budget_bytes"] < plan["weight_bytes"] / 2
        elif plan["budget_bytes"]:
            assert plan["resident_bytes"] == plan["weight_bytes"]

    # -- what is to be expected --------------------------------------------------------------------------------------------
    def changed_by(self, *names: str, but: str = " ") -> dict[str, int]:
        """How many units of each network change when a set of networks comes, goes, or gives way to another; not counting
        those whose names end with `but`, nor the UNet's `out` where stock leaves it on the device (`--lowvram`)."""
        counted = {network: {unit for name in names for unit in self.files[name].units[network]} for network in NETWORKS}
        if not self.medvram:
            counted["unet"] = {unit for unit in counted["unet"] if not unit.startswith(UNET + "out.")}
        return {network: sum(not unit.endswith(but) for unit in units) for network, units in counted.items()}

    def unheard_of(self, number: int) -> str:
        """A prompt of its own: the host keeps the encoding of the last one, and the text encoder would stand by."""
        return f"{PLAIN['prompt']}, number {number}"


def growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By network; one that is new, or whose counters began anew, counts from zero."""
    grew = {}
    for name, now in after["networks"].items():
        then = before["networks"].get(name, {})
        anew = any(now[key] < then.get(key, 0) for key in COUNTERS)
        grew[name] = {key: now[key] - (0 if anew else then.get(key, 0)) for key in COUNTERS}
    return grew


def total(*parts: dict[str, int]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in NETWORKS}


NOTHING = dict.fromkeys(NETWORKS, 0)


def tag(name: str, strength: float | str = 1) -> str:
    return f"<lora:{name}:{strength}>"


def tags(names: Iterable[str]) -> str:
    return "".join(tag(name) for name in names)
