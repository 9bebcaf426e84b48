"""What the line and the opened panel say in each state of the extension, and that what is not known is never a 0."""

from __future__ import annotations

import pytest
from panel_examples import MB, active, learning, standing_down, trial

FIGURES = ("speed", "stock", "limit")


def figures_of(panel):
    return [panel.text(f"[data-figure={name}]") for name in FIGURES if panel.shown(f"[data-figure={name}]")]


def test_never_more_than_all_of_the_limit(visit, answers):
    """How long computing takes may have been learned while the device was busier."""
    answers.status = active(efficiency=1.27, schedule_efficiency=1.3)
    panel = visit()
    assert figures_of(panel)[2] == "100% of the limit"
    panel.open()
    assert panel.texts(".alv-passes .alv-quiet")[1:3] == ["100% reached", "100% reached"]


def test_active(visit):
    panel = visit()
    assert (panel.state, panel.text(".alv-state")) == ("active", "On: weights travel while the GPU computes")
    assert figures_of(panel) == ["2.43 it/s", "2.38 times stock", "95% of the limit"]
    assert not panel.shown(".alv-body")
    panel.open()
    assert panel.texts(".alv-advice li") == [
        "Copy-bound: 300 MB more budget would save about 60 ms per step.",
        "“Batch cond/uncond” is off: every step moves the weights twice.",
    ]
    assert panel.texts(".alv-passes th") == ["This pass", "Best schedule", "Limit", "Stock"]
    assert panel.texts(".alv-passes .alv-size") == ["412 ms", "400 ms", "391 ms", "980 ms"]
    assert panel.texts(".alv-passes .alv-quiet") == ["", "97% reached", "95% reached", "2.38 times"]
    facts = {
        "stall": "12.3 ms",
        "worst": "1.20 ms · unet.input_blocks.1.0.in_layers.2",
        "bound": "computing",
        "streamed": "940 MB",
        "rate": "2.4 GB/s of 11.8 GB/s",
        "host": "1.68 GB",
        "pinned": "1.60 GB of at most 9.60 GB",
        "previews": "8 shown, 1 skipped, 50.0 ms each",
        "device": "NVIDIA GeForce GTX 1650",
        "version": "1.0.0",
    }
    assert {name: panel.fact(name) for name in facts} == facts
    assert panel.page.locator("#async_lowvram [data-fact=disk]").count() == 0


def test_a_slow_pass_is_told_as_the_webui_does(visit, answers):
    answers.status = active(pass_seconds=2.5)
    assert figures_of(visit())[0] == "2.50 s/it"


def test_learning_and_nothing_known(visit, answers):
    """Nulls are dashes; no 0 where nothing was measured."""
    answers.status = learning(generating=False)
    panel = visit()
    assert (panel.state, panel.text(".alv-state")) == ("learning", "Ready: learns from the first step of the next picture")
    assert figures_of(panel) == []
    panel.open()
    assert set(panel.texts(".alv-passes .alv-size")) == {"–"}
    assert [panel.fact(name) for name in ("stall", "worst", "bound", "streamed", "rate", "host")] == ["–"] * 6
    assert not panel.shown(".alv-bar") and not panel.shown(".alv-advice") and not panel.shown(".alv-messages")
    assert "Not known yet." in panel.text(".alv-columns")
    widths = panel.page.eval_on_selector_all("#async_lowvram .alv-fill", "(bars) => bars.map((bar) => bar.getBoundingClientRect().width)")
    assert widths == [0, 0, 0, 0]


def test_learning_in_a_job(visit, answers):
    answers.status = learning(generating=True)
    assert visit().text(".alv-state") == "Learning: the first step of each network is watched"


@pytest.mark.parametrize(
    "change, missing",
    [
        ({"stock_pass_seconds": None}, 1),
        ({"stock_pass_seconds": 0.0}, 1),
        ({"efficiency": None}, 2),
        ({"pass_seconds": None}, 0),
    ],
)
def test_a_figure_that_is_not_known_is_left_out(visit, answers, change, missing):
    answers.status = active(**change)
    shown = figures_of(visit())
    assert len(shown) == (1 if "pass_seconds" in change else 2)
    assert not any(text.startswith(("0", "–", "Inf", "NaN")) for text in shown)


def test_the_speed_is_the_unets(visit, answers):
    """While the VAE is in use, its passes are not called it/s."""
    answers.status = active(network="vae")
    panel = visit()
    assert figures_of(panel) == []
    panel.open()
    assert panel.text(".alv-section:has(.alv-passes) .alv-heading") == "Time per pass vae"


@pytest.mark.parametrize(
    "status, state, text",
    [
        (standing_down(), "standing_down", "Standing down: the WebUI was started without --lowvram"),
        (standing_down(reason=""), "standing_down", "Standing down: no reason given"),
        (active(state="demoted", reason="a copy failed"), "demoted", "Gave way to stock: a copy failed"),
        (active(state="something new"), "demoted", "A state this page does not know: reload the page"),
    ],
)
def test_it_does_nothing_and_says_why(visit, answers, status, state, text):
    answers.status = status
    panel = visit()
    assert (panel.state, panel.text(".alv-state")) == (state, text)
    assert figures_of(panel) == []
    panel.open()
    for part in (".alv-bar", ".alv-passes", ".alv-facts", ".alv-canvas", "[data-do=try]"):
        assert not panel.shown(part), part
    assert panel.shown("[data-do=report]")


def test_demoted_shows_what_was_said(visit, answers):
    answers.status = active(state="demoted", reason="a copy failed", advices=[{"id": "x", "text": "Restart it.", "values": {}}])
    panel = visit()
    panel.open()
    assert panel.texts(".alv-advice li") == ["Restart it."]
    assert panel.text(".alv-folded summary") == "Messages (3)"


def test_it_folds_when_it_gives_way(visit, answers):
    panel = visit()
    panel.open()
    answers.status = active(state="demoted", reason="a copy failed")
    panel.refresh()
    assert panel.state == "demoted" and not panel.shown(".alv-body")


def test_not_there(visit, answers):
    answers.status = 404
    panel = visit()
    assert panel.state == "missing"
    assert panel.text(".alv-state").startswith("Not there: this WebUI has no Async LowVRAM running.")
    panel.open()
    assert panel.shown("[data-do=report]") and not panel.shown(".alv-advice") and not panel.shown(".alv-messages")


@pytest.mark.parametrize("code", [500, 502, 401])
def test_an_error(visit, answers, code):
    answers.status = code
    panel = visit()
    assert (panel.state, panel.text(".alv-state")) == ("unreachable", f"No answer from the WebUI (HTTP {code})")


def test_an_answer_that_is_no_status(visit, answers):
    """A proxy's page, or a list: said, not drawn."""
    answers.status = 200
    panel = visit()
    assert panel.state == "unreachable"


def test_the_network_is_gone_and_the_last_figures_stay(visit, answers):
    panel = visit()
    panel.open()
    panel.page.route("**/async-lowvram/status", lambda route: route.abort())
    panel.refresh()
    assert (panel.state, panel.text(".alv-state")) == ("unreachable", "No answer from the WebUI")
    assert figures_of(panel) == []
    assert panel.fact("device") == "NVIDIA GeForce GTX 1650"
    panel.page.unroute("**/async-lowvram/status")
    panel.refresh()
    assert panel.state == "active"


def test_restart(visit, answers):
    answers.status = active(restart="restart the WebUI to use 1.1.0")
    panel = visit()
    assert panel.text(".alv-notice") == "restart the WebUI to use 1.1.0"


def test_a_newer_schema(visit, answers):
    answers.status = active(schema=2)
    assert visit().text(".alv-notice") == "The extension was updated: reload this page."


def test_vram_bar(visit):
    """Parts in proportion, the mark where the budget ends, and the same in words."""
    panel = visit()
    panel.open()
    bar = panel.page.locator("#async_lowvram .alv-bar")
    inner = bar.evaluate("(bar) => bar.clientWidth")
    widths = panel.page.eval_on_selector_all(
        "#async_lowvram .alv-part",
        "(parts) => Promise.all(parts.map((part) => Promise.all(part.getAnimations().map((one) => one.finished))))"
        ".then(() => Object.fromEntries(parts.map((part) => [part.dataset.part, part.getBoundingClientRect().width])))",
    )
    expected = {"resident": 700, "ring": 180, "activations": 900, "others": 600, "free": 1716}
    assert set(widths) == set(expected)
    for name, size in expected.items():
        assert widths[name] == pytest.approx(inner * size / 4096, abs=1), name
    mark = panel.page.eval_on_selector("#async_lowvram .alv-budget", "(mark) => mark.offsetLeft")
    assert mark == pytest.approx(inner * 1200 / 4096, abs=1)
    assert bar.get_attribute("aria-valuenow") == "58"
    assert bar.get_attribute("aria-valuetext") == (
        "of 4.00 GB: weights that stay 700 MB, weights on their way 180 MB, pictures in the making 900 MB, others 600 MB, free 1.68 GB, "
        "budget for weights 1.17 GB"
    )


def test_vram_of_a_device_of_unknown_size(visit, answers):
    """The parts that are known, in proportion to each other and to the budget; the others are dashes."""
    answers.status = active(
        vram={
            "total": None,
            "resident": 300 * MB,
            "ring": 100 * MB,
            "activations": None,
            "others": None,
            "free": None,
            "budget": 800 * MB,
        }
    )
    panel = visit()
    panel.open()
    sizes = panel.texts(".alv-legend li")
    assert sizes == [
        "weights that stay 300 MB",
        "weights on their way 100 MB",
        "pictures in the making –",
        "others –",
        "free –",
        "budget for weights 800 MB",
    ]
    share = panel.page.eval_on_selector("#async_lowvram [data-part=resident].alv-part", "(part) => part.style.width")
    assert float(share.rstrip("%")) == pytest.approx(37.5)


def test_weights_on_disk(visit, answers):
    answers.status = active(disk={"read_bytes": 512 * MB, "bytes_per_s": 2.5e9})
    panel = visit()
    panel.open()
    assert panel.fact("disk") == "512 MB · 2.5 GB/s"
    answers.status = active(disk={"read_bytes": 512 * MB, "bytes_per_s": None})
    panel.refresh()
    assert panel.fact("disk") == "512 MB"
    answers.status = active()
    panel.refresh()
    assert not panel.shown("[data-fact=disk]")


def test_messages_newest_first_and_folded(visit):
    panel = visit()
    panel.open()
    assert not panel.shown(".alv-messages")
    panel.page.click("#async_lowvram summary")
    assert panel.texts(".alv-messages .alv-text") == [
        "Memory ran out: the budget is 256 MB less now. (2 times)",
        "A pass was repeated.",
        "Took over 3 networks.",
    ]
    assert panel.texts(".alv-messages .alv-level") == ["warning", "error", "note"]


@pytest.mark.parametrize(
    "broken",
    [
        {"vram": None, "advices": None, "messages": None, "preview": None, "trial": None, "worst_stall": None},
        {"vram": {}, "advices": [None, {}], "messages": [None, {}], "preview": {}, "trial": {}, "disk": {}, "worst_stall": {}},
        {"vram": "x", "pass_seconds": "x", "efficiency": "x", "device": 3, "reason": 3, "state": "active"},
    ],
)
def test_an_older_or_broken_status_is_survived(visit, answers, broken):
    answers.status = active(**broken)
    panel = visit()
    panel.open()
    assert panel.state == "active"


def test_nothing_moves_when_figures_change(visit, answers):
    """Rows keep their places: a click must not miss because a number grew."""
    panel = visit()
    panel.open()
    where = (
        "() => [...document.querySelectorAll('#async_lowvram .alv-facts > div, #async_lowvram .alv-buttons')].map((one) => one.offsetTop)"
    )
    before = panel.page.evaluate(where)
    answers.status = active(pass_seconds=0.0734, stall_seconds=0.0, worst_stall=None, streamed_bytes_per_pass=12345 * MB)
    panel.refresh()
    assert panel.page.evaluate(where) == before
    assert panel.page.eval_on_selector("#async_lowvram", "(root) => getComputedStyle(root).fontVariantNumeric") == "tabular-nums"


def test_an_update_adds_no_nodes(visit, answers):
    """The WebUI and every extension look at each added node of the page: a figure that changes must not be one."""
    panel = visit()
    panel.open()
    panel.page.evaluate("() => { window.seenChanges = 0; }")
    answers.status = active(pass_seconds=0.399, stall_seconds=0.001, trial=trial("idle"))
    panel.refresh()
    assert panel.fact("stall") == "1.00 ms"
    assert panel.page.evaluate("() => window.seenChanges") == 0
