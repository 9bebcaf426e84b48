"""One case: all contenders and budgets on one workload over one link, interleaved in one run.

Problem: what is claimed must be measured side by side. The resident model gives the reference outputs, the compute time and
each leaf's share of it; from these, the limit and the best schedule. Then every contender is set up and warmed up (the mover:
its learning pass, and a second job, as between two pictures), freed memory stops being poisoned on the simulated device, and
the contenders take turns for several rounds: a machine that slows down meanwhile slows all of them down. A contender that can
gives its device memory back between its turns, so that they need not all fit at once; the first passes of a turn, which get it
again, are compared but not timed.

The mover's budgets are one mover's, one after the other: as many movers would pin as many copies of the weights.

Peers are others' code: when one fails, its error is reported in its row's place, and the others go on.

Called by `running` on the main thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lib_async_lowvram.bench import diffusers_unet, peers
from lib_async_lowvram.bench.contenders import Async, Contender, Resident, Stock
from lib_async_lowvram.bench.deadline import Costed, Deadline, fit
from lib_async_lowvram.bench.devices import is_simulated, measure_link, open_for_contender, small_unit_bytes
from lib_async_lowvram.bench.judging import Judge, Row
from lib_async_lowvram.bench.measuring import Passes
from lib_async_lowvram.bench.memory import DeviceMemory
from lib_async_lowvram.bench.options import Budget
from lib_async_lowvram.bench.profile import profile
from lib_async_lowvram.bench.results import bound_by_python
from lib_async_lowvram.bench.unet import load_unet
from lib_async_lowvram.bench.workloads import Workload
from lib_async_lowvram.device.streams import Streams

CALIBRATING, PROFILED, WARM_UP, PEER_WARM_UP = 7, 5, 3, 2
"""Resident passes to know the compute time by, and to time leaves in; passes before any is timed (the mover's twice)."""


class Case:
    """`contenders`, `budgets`: as parsed. `link_factor`: on the simulated device, how much faster the link is than the one that
    streams everything in the time of computing. `tell`: what is going on; `tick`: after every pass."""

    def __init__(
        self,
        load: Workload,
        weights: dict[str, torch.Tensor],
        device: Streams,
        *,
        contenders: tuple[str, ...],
        budgets: tuple[Budget, ...],
        rounds: int,
        passes: int,
        seed: int,
        link_factor: float,
        deadline: Deadline,
        tell: Callable[[str], object],
        tick: Callable[[], object],
    ) -> None:
        self._load, self._weights, self._device = load, weights, device
        self._contenders, self._budgets = contenders, budgets
        self._wanted_rounds, self._wanted_passes = rounds, passes
        self._factor, self._deadline, self._tell, self._tick = link_factor, deadline, tell, tick
        self._simulated = is_simulated(device)
        self._inputs = load.inputs(seed, device.device)
        self._ours, self._theirs = Passes(self._inputs, tick), Passes(self._inputs, tick)
        self._rows: list[Row] = []
        self._not_run: list[dict[str, str]] = []
        self._dropped: list[str] = []
        self._difference: dict[str, float] | None = None
        self._bandwidth: float | None = None
        self._total = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())

    def run(self) -> dict[str, Any]:
        """The case, JSON-ready. Raises torch's out-of-memory error when not even the resident model fits."""
        with contextlib.ExitStack() as self._stack:
            judge = self._prepare()
            self._warm_up_all()
            self._add_budgets(judge)
            chosen = fit(
                [Costed(row.key, row.seconds, row.settling, self._needed(row)) for row in self._rows],
                self._wanted_rounds,
                self._wanted_passes,
                self._deadline.left(),
            )
            self._dropped += chosen.dropped
            self._rows = [row for row in self._rows if row.key in chosen.keys]
            if self._simulated:
                # So far freed memory was filled with NaN. No real device does that, and it takes the time of a copy.
                for row in self._rows:
                    row.contender.streams.poison = False
            rounds = self._measure(chosen.rounds, chosen.passes)
            self._tell("looking for the best schedules")
            results = [judge.result(row, self._compute_seconds(row)).as_json() for row in self._rows]
        return {
            "workload": self._load.as_json(),
            "weight_bytes": self._total,
            "link_factor": self._factor if self._simulated else None,
            "bandwidth_bytes_per_s": self._bandwidth,
            "compute_seconds": self._ours.median("resident"),
            "python_bound": bound_by_python(results[0]),
            "diffusers_difference": self._difference,
            "warm_up": {"learning": 2 * WARM_UP, "peers": PEER_WARM_UP, "settling": {row.key: row.settling for row in self._rows}},
            "rounds": rounds,
            "passes_per_round": chosen.passes,
            "compared_passes": self._ours.compared + self._theirs.compared,
            "results": results,
            "not_run": self._not_run,
            "dropped": self._dropped,
        }

    def _compute_seconds(self, row: Row) -> float:
        """Of the row's own model with everything resident, at the pace that the machine had meanwhile."""
        if row.pace is not None:
            return row.passes.median(row.pace)
        return row.passes.median("diffusers-resident" if row.passes is self._theirs else "resident")

    # -- before the rounds ---------------------------------------------------------------------------------------------
    def _prepare(self) -> Judge:
        """The resident model: references, compute time, profile; the link."""
        self._tell("resident: references and calibration")
        resident = Resident(load_unet(self._load.shape, self._weights), self._open())
        row = self._set_up(resident, self._ours)
        with row.turn():
            self._ours.take_references(resident)
            self._ours.warm_up(resident, 1)
            self._ours.measure(resident, CALIBRATING, "calibration")
            row.seconds = self._ours.median("calibration")
            leaves = profile(resident.model, resident.streams, [partial(resident.run_pass, self._inputs[n % 3]) for n in range(PROFILED)])
            resident.rest()
        # What the limit rests on in the end is measured beside the others.
        self._bandwidth = self._total / row.seconds * self._factor if self._simulated else measure_link(self._device)
        return Judge(leaves, self._total, self._bandwidth, self._simulated, row)

    def _open(self, bandwidth: float | None = None) -> Streams:
        return open_for_contender(self._device, self._stack, 2 * self._total, bandwidth)

    def _set_up(self, contender: Contender, passes: Passes) -> Row:
        memory = DeviceMemory(contender.streams)
        with memory.turn():
            self._stack.enter_context(contender)
        row = Row(contender.name, contender, passes, memory)
        self._rows.append(row)
        return row

    def _warm_up_all(self) -> None:
        for name in self._contenders:
            if name in ("resident", "async"):
                continue
            if self._deadline.left() <= 0 and name != "stock":
                self._dropped.append(f"{name}: no time left to set it up")
                continue
            self._tell(f"{name}: warming up")
            if name == "stock":
                self._warm_up(Stock(load_unet(self._load.shape, self._weights), self._open(self._bandwidth)), self._ours, WARM_UP)
            else:
                self._warm_up_peer(name)
        if "async" in self._contenders:
            self._tell("async: learning and warming up")
            least = min((budget.of(self._total) for budget in self._budgets if not budget.equal), default=self._total // 2)
            model, streams = load_unet(self._load.shape, self._weights), self._open(self._bandwidth)
            self._mover = Async(model, streams, least, small_leaf_bytes=small_unit_bytes(self._total))
            row = self._set_up(self._mover, self._ours)
            with row.memory.turn():
                self._ours.warm_up(self._mover, WARM_UP)
                self._mover.new_job()
                row.seconds = self._ours.warm_up(self._mover, WARM_UP)
                self._mover.rest()

    def _warm_up(self, contender: Contender, passes: Passes, count: int) -> None:
        row = self._set_up(contender, passes)
        with row.turn():
            passes.warm_up(contender, 1)  # with whatever a first pass needs
            contender.reset()
            row.seconds = passes.warm_up(contender, count - 1)
            row.peak_weight_bytes = contender.measured().peak_weight_bytes
            contender.rest()

    def _warm_up_peer(self, name: str) -> None:
        reason = peers.why_not(name, self._device)
        if not reason and name != "diffusers-resident" and self._difference is None:
            reason = "diffusers-resident, which it is compared with, did not run"
        if reason:
            self._not_run.append({"contender": name, "reason": reason})
            return
        rows, contender = len(self._rows), None
        try:
            model = diffusers_unet.build(self._load.shape, self._weights)
            contender = peers.make_peer(name, model, self._open())
            if name == "diffusers-resident":
                self._compare_models(contender)
            else:
                self._warm_up(contender, self._theirs, PEER_WARM_UP)
        except Exception as error:  # others' code: whatever it raises goes into the report
            del self._rows[rows:]
            if contender is not None:
                contender.close()
            first = (str(error).splitlines() or [""])[0]
            self._not_run.append({"contender": name, "reason": f"failed: {type(error).__name__}: {first}"})

    def _compare_models(self, contender: Contender) -> None:
        """diffusers' model beside ours: its outputs are its peers' references, and close to ours."""
        row = self._set_up(contender, self._theirs)
        with row.turn():
            self._theirs.take_references(contender)
            row.seconds = self._theirs.warm_up(contender, 1)
            contender.rest()
        pairs = list(zip(self._ours.references, self._theirs.references, strict=True))
        largest = max(float((ours.float() - theirs.float()).abs().max()) for ours, theirs in pairs)
        scale = max(float(ours.float().abs().max()) for ours, _ in pairs)
        self._difference = {"largest": largest, "relative_to_largest_output": largest / scale}

    def _add_budgets(self, judge: Judge) -> None:
        """A row of the mover for each budget, in place of the one that stood for all of them."""
        if "async" not in self._contenders:
            return
        mine = self._rows.pop()
        wanted: list[tuple[str, int, str | None]] = []
        for budget in self._budgets:
            if not budget.equal:
                wanted.append((f"async {budget}", budget.of(self._total), None))
                continue
            others = [(row.key, judge.weights_on_device(row)) for row in self._rows[1:]]
            found = [(f"async = {key}", taken, key) for key, taken in others if taken is not None and taken < self._total]
            wanted += found
            if not found:
                self._dropped.append("async equal: no other contender ran whose device memory is known")
        for key, nbytes, equal_to in wanted:
            self._rows.append(Row(key, mine.contender, self._ours, mine.memory, mine.seconds, nbytes, equal_to))

    def _needed(self, row: Row) -> bool:
        """Others are judged by it, or it is the only one of the mover's."""
        first = next((other for other in self._rows if other.contender.name == "async"), None)
        return row.contender.name in ("resident", "stock", "diffusers-resident") or row is first

    # -- rounds --------------------------------------------------------------------------------------------------------
    def _measure(self, rounds: int, passes: int) -> int:
        """In turn. Stops after a whole round when the next would not fit. Returns how many there were."""
        done = 0
        for _ in range(rounds):
            before = self._deadline.left()
            for row in list(self._rows):
                self._tell(f"measuring {row.key}")
                self._turn(row, passes)
            done += 1
            took = before - self._deadline.left()
            if done < rounds and self._deadline.left() < took:
                self._dropped.append(f"rounds: {done} instead of {rounds}, they took longer than expected")
                break
        return done

    def _turn(self, row: Row, passes: int) -> None:
        contender = row.contender
        self._keep_pace(row, passes)
        with row.turn():
            if isinstance(contender, Async):
                contender.rebudget(row.budget_bytes)
            contender.reset()
            row.passes.warm_up(contender, row.settling, row.key)
            row.passes.measure(contender, passes, row.key)
            measured = contender.measured()
            if isinstance(contender, Async):
                row.effective_bytes = contender.effective_budget_bytes()
            row.pinned_bytes, row.details = contender.pinned_bytes(), measured.details
            contender.rest()
        if measured.peak_weight_bytes is not None:
            row.peak_weight_bytes = max(measured.peak_weight_bytes, row.peak_weight_bytes or 0)
        self._keep_pace(row, passes)

    def _keep_pace(self, row: Row, passes: int) -> None:
        """On the simulated device, whose computing shares its cores with everything else on the machine, the resident model's passes
        right before and right after a turn of the mover's: that is what the turn is held against, not a median over minutes."""
        resident = self._rows[0]
        if not (self._simulated and isinstance(row.contender, Async)):
            return
        row.pace = f"pace of {row.key}"
        with resident.turn():
            self._ours.warm_up(resident.contender, 1)
            self._ours.measure(resident.contender, passes, row.pace)
