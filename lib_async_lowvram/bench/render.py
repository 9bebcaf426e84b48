"""Tables and the picture of a benchmark's document, fresh or stored.

Problem: the same figures are read in a terminal, in docs/benchmarks.md and as a picture of time against budget; each must come
from the JSON and from nothing else.

Pure functions of a checked document (`results.check`); matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lib_async_lowvram.bench.report import table
from lib_async_lowvram.bench.results import bound_by_python

HEADER = (
    "contender",
    "budget",
    "ms/pass",
    "spread",
    "it/s",
    "limit",
    "floor",
    "best",
    "efficiency",
    "schedule",
    "stall",
    "us/unit",
    "weights",
    "device",
    "pinned",
    "bits",
)
UNKNOWN = "-"
PYTHON_BOUND_MARK = "(Py)"


def text(document: dict[str, Any]) -> str:
    """For a terminal."""
    return "\n".join(_parts(document, lambda header, rows: table(header, rows), heading="{}"))


def markdown(document: dict[str, Any]) -> str:
    """For a page: what it ran on, a table per case, what was not run."""
    lines = [*_environment_lines(document), ""]
    return "\n".join([*lines, *_parts(document, _markdown_table, heading="### {}")]).rstrip() + "\n"


def _environment_lines(document: dict[str, Any]) -> list[str]:
    env, settings = document["environment"], document["settings"]
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    driver = f", driver {env['driver']}, CUDA {env['cuda']}" if env["driver"] or env["cuda"] else ""
    return [
        f"Device: {env['device']}{driver}; {env['cpu']}, {env['cores']} cores, {env['ram_bytes'] / 2**30:.0f} GB of main memory; "
        f"{env['system']}.",
        f"torch {env['torch']}, Python {env['python']}, Async LowVRAM {env['async_lowvram']}{', ' + packages if packages else ''}. "
        f"Seed {settings['seed']}; measured {document['created']}.",
    ]


def _parts(document: dict[str, Any], make_table: Any, heading: str) -> Iterable[str]:
    for case in document["cases"]:
        yield heading.format(title(case))
        yield ""
        yield _facts(case)
        yield ""
        yield make_table(HEADER, [_row(result) for result in case["results"]])
        yield ""
        for entry in case["not_run"]:
            yield f"- not run here: {entry['contender']}: {entry['reason']}"
        for line in case["dropped"]:
            yield f"- left out to keep the time: {line}"
        if any(bound_by_python(result) for result in case["results"]):
            yield f"- {PYTHON_BOUND_MARK}: launching took nearly all of the time: bound by Python, not by the device"
        yield ""
    if document["loading"]:
        yield heading.format("Unloading and loading all components of SDXL")
        yield ""
        first = document["loading"][0]
        yield f"{_mb(first['weight_bytes'])} of weights; link {_rate(first['bandwidth_bytes_per_s'])}."
        yield ""
        header = ("contender", "unload", "load", "share of link", "rounds", "bits")
        yield make_table(header, [_loading_row(result) for result in document["loading"]])
        yield ""
    if document["regions"]:
        yield heading.format("Unloading and loading each region, as --medvram does")
        yield ""
        header = ("region", "contender", "weights", "unload", "load", "share of link", "rounds", "bits")
        yield make_table(header, [_region_row(result) for result in document["regions"]])
        yield ""
    if document["pictures"]:
        yield heading.format("A picture's turn: text encoders, UNet, VAE")
        yield ""
        yield _picture_facts(document["pictures"][0])
        yield ""
        header = ("contender", "ms", "spread", "there ahead", "rounds", "bits")
        yield make_table(header, [_picture_row(result) for result in document["pictures"]])
        yield ""
    yield from (f"- {note}" for note in document["notes"])


def title(case: dict[str, Any]) -> str:
    load = case["workload"]
    link = f", link x{case['link_factor']:g}" if case["link_factor"] is not None else ""
    return f"{load['model']}, {load['picture']}x{load['picture']}, batch {load['batch']}{link}"


def _facts(case: dict[str, Any]) -> str:
    load = case["workload"]
    shape = "exact shape" if load["exact_shape"] else f"{load['channels']} channels instead of 320"
    told = [
        f"{_mb(case['weight_bytes'])} of weights ({load['dtype']}, {shape})",
        f"computing alone {_ms(case['compute_seconds'])} ms",
        f"link {_rate(case['bandwidth_bytes_per_s'])}: all weights in {_ms(case['weight_bytes'] / case['bandwidth_bytes_per_s'])} ms",
        f"{case['compared_passes']} outputs compared",
    ]
    if case.get("diffusers_difference"):
        told.append(f"diffusers' output differs by {case['diffusers_difference']['relative_to_largest_output']:.1e} of the largest")
    if case["python_bound"]:
        told.append("the resident model is bound by Python, not by the device")
    return "; ".join(told) + "."


def _row(result: dict[str, Any]) -> list[str]:
    low, high = result["spread_seconds"][1], result["spread_seconds"][2]
    budget = result["effective_budget_bytes"]
    asked = result["budget_bytes"]
    shown = UNKNOWN if budget is None else _mb(budget)
    if budget is not None and asked is not None and budget > asked:
        shown += f" (asked {_mb(asked)})"
    if result["equal_to"]:
        shown += f" = {result['equal_to']}"
    return [
        result["contender"] + (f" {PYTHON_BOUND_MARK}" if bound_by_python(result) else ""),
        shown,
        _ms(result["seconds_per_pass"]),
        f"{_ms(low)}-{_ms(high)}",
        f"{result['iterations_per_second']:.2f}",
        _ms(result["limit_seconds"]),
        _ms(result["floor_seconds"]),
        _ms(result["best_schedule_seconds"]),
        _share(result["efficiency"]),
        _share(result["schedule_efficiency"]),
        _ms(result["stall_seconds"]),
        UNKNOWN if result["overhead_per_unit_seconds"] is None else f"{result['overhead_per_unit_seconds'] * 1e6:.0f}",
        _mb(result["peak_weight_bytes"]),
        _mb(result["peak_device_bytes"]),
        _mb(result["host_pinned_bytes"]),
        "equal" if result["bitwise_equal"] else "DIFFER",
    ]


def _loading_row(result: dict[str, Any]) -> list[str]:
    return [
        result["contender"],
        f"{_ms(result['unload_seconds'])} ms",
        f"{_ms(result['load_seconds'])} ms",
        _share(result["share_of_link"]),
        str(result["rounds"]),
        "equal" if result["bitwise_equal"] else "DIFFER",
    ]


def _region_row(result: dict[str, Any]) -> list[str]:
    contender, *rest = _loading_row(result)
    return [result["region"], contender, _mb(result["weight_bytes"]), *rest]


def _picture_facts(first: dict[str, Any]) -> str:
    computing = ", ".join(f"{region} {_ms(seconds)} ms" for region, seconds in first["compute_seconds"].items())
    return (
        f"{_mb(first['weight_bytes'])} of weights; link {_rate(first['bandwidth_bytes_per_s'])}; {first['prompts']} prompts, "
        f"{first['unet_passes']} passes of the UNet, one decoding; a pass computes for: {computing}."
    )


def _picture_row(result: dict[str, Any]) -> list[str]:
    low, high = result["spread_seconds"]
    return [
        result["contender"],
        _ms(result["seconds"]),
        f"{_ms(low)}-{_ms(high)}",
        _mb(result["fetched_ahead_bytes"]),
        str(result["rounds"]),
        "equal" if result["bitwise_equal"] else "DIFFER",
    ]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def _mb(nbytes: int | None) -> str:
    return UNKNOWN if nbytes is None else f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:.2f} GB/s"


COLOURS = {
    "async": "#0072b2",
    "stock": "#d55e00",
    "resident": "#009e73",
    "accelerate": "#cc79a7",
    "diffusers-group": "#e69f00",
    "diffusers-group-record": "#f0b429",
    "diffusers-resident": "#56b4e9",
    "mmgp": "#7a5195",
}
"""Of Okabe and Ito's palette, and near it."""


def draw(path: Path, document: dict[str, Any]) -> None:
    """Write a PNG: a panel per case, time per pass against device bytes for weights, the limit and the best schedule as lines.
    Raises OSError where `path` cannot be written, ValueError for a document without cases."""
    # Not pyplot: it would keep figures and choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = document["cases"]
    if not cases:
        raise ValueError("no cases to draw")
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.6 * lines + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Time per pass against device memory for weights: {document['environment']['device']}", fontsize=12)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, case in zip(axes, cases, strict=False):
        _draw_case(axis, case)
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    figure.savefig(path, format="png")


def _draw_case(axis: Any, case: dict[str, Any]) -> None:
    total, bandwidth, compute = case["weight_bytes"], case["bandwidth_bytes_per_s"], case["compute_seconds"]
    held = [total * step / 200 for step in range(201)]
    limits = [1e3 * max(compute, (total - nbytes) / bandwidth) for nbytes in held]
    axis.plot([nbytes / 1e6 for nbytes in held], limits, color="black", linewidth=1.2, label="limit")
    ours = sorted((r for r in case["results"] if r["contender"] == "async"), key=lambda result: result["effective_budget_bytes"])
    if ours:
        x = [result["effective_budget_bytes"] / 1e6 for result in ours]
        if all(r["floor_seconds"] is not None for r in ours):
            axis.plot(x, [1e3 * r["floor_seconds"] for r in ours], ":", color="black", linewidth=1.2, label="floor")
        axis.plot(x, [1e3 * r["best_schedule_seconds"] for r in ours], "--", color="#666666", linewidth=1.2, label="best schedule")
        axis.errorbar(x, [1e3 * r["seconds_per_pass"] for r in ours], _bars(ours), fmt="o-", color=COLOURS["async"], label="async")
    for result in case["results"]:
        name = result["contender"]
        if name == "async":
            continue
        if result["peak_weight_bytes"] is None:
            axis.axhline(1e3 * result["seconds_per_pass"], color=COLOURS[name], linestyle=":", label=name)
            continue
        point = [result["peak_weight_bytes"] / 1e6], [1e3 * result["seconds_per_pass"]]
        axis.errorbar(*point, _bars([result]), fmt="s", color=COLOURS[name], label=name)
    times = [result["seconds_per_pass"] for result in case["results"]]
    if max(times) > 5 * min(times):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
    else:
        axis.set_ylim(bottom=0)
    axis.set_title(title(case), fontsize=10)
    axis.set_xlabel("device memory for weights (MB)")
    axis.set_ylabel("ms per pass")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def _bars(results: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Milliseconds from the median down to the lower quartile, and up to the upper one."""
    low = [1e3 * max(0.0, r["seconds_per_pass"] - r["spread_seconds"][1]) for r in results]
    high = [1e3 * max(0.0, r["spread_seconds"][2] - r["seconds_per_pass"]) for r in results]
    return [low, high]
