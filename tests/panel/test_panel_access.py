"""For everybody: both themes readable, keyboard and screen reader, narrow screens, no motion where none is wanted."""

from __future__ import annotations

import pytest
from panel_examples import RESULT, active, standing_down, timeline, trial

CONTRAST = """
() => {
    // Relative luminance and contrast as in WCAG 2.1. A canvas makes any CSS colour into sRGB numbers.
    const pen = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
    function rgba(colour, under) {
        pen.clearRect(0, 0, 1, 1);
        if (under) { pen.fillStyle = under; pen.fillRect(0, 0, 1, 1); }
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        return [...pen.getImageData(0, 0, 1, 1).data];
    }
    const css = (one) => `rgb(${one[0]} ${one[1]} ${one[2]})`;
    const straight = (one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    const light = (colour) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, at) => sum + weight * straight(colour[at] / 255), 0);
    function ground(element) {
        const layers = [];
        for (let at = element; at; at = at.parentElement) layers.push(at);
        let found = "white";
        for (const at of layers.reverse()) {
            const style = getComputedStyle(at);
            const first = style.backgroundImage.match(/rgba?\\([^)]*\\)/g) || [];
            found = css(rgba(style.backgroundColor, found));
            if (first.length) found = css(rgba(first[0], found)); // a button's gradient: its first colour
        }
        return found;
    }
    const found = [];
    const walker = document.createTreeWalker(document.querySelector("#async_lowvram"), NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        const holder = node.parentElement;
        if (!node.data.trim() || !holder.getClientRects().length) continue;
        const under = ground(holder), text = rgba(getComputedStyle(holder).color, under);
        const a = light(text), b = light(rgba(under));
        found.push([node.data.trim(), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
    }
    return found;
}
"""


def fill(panel, answers):
    """Everything that can be shown, shown."""
    answers.timeline = timeline()
    answers.status = active(trial=trial("done", 1.0, "", RESULT), restart="restart it")
    panel.open()
    panel.refresh()
    panel.page.click("#async_lowvram summary")
    panel.wait_for_text(".alv-result", "Async")
    panel.settle()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_can_be_read(visit, answers, dark, tmp_path):
    answers.timeline = timeline()
    panel = visit(dark=dark)
    assert panel.page.evaluate("() => document.body.classList.contains('dark')") is dark
    fill(panel, answers)
    ratios = dict(panel.page.evaluate(CONTRAST))
    assert len(ratios) > 50
    assert {text: round(ratio, 2) for text, ratio in ratios.items() if ratio < 4.5} == {}
    panel.page.locator("#async_lowvram").screenshot(path=tmp_path / "panel.png")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_marks_can_be_seen(visit, answers, dark):
    """Colours of figures against the ground, 3:1 (WCAG 1.4.11)."""
    panel = visit(dark=dark)
    weak = panel.page.evaluate(
        """() => {
            const root = document.querySelector("#async_lowvram"), pen = document.createElement("canvas").getContext("2d");
            function rgb(colour) {
                pen.fillStyle = colour;
                pen.fillRect(0, 0, 1, 1);
                return [...pen.getImageData(0, 0, 1, 1).data.slice(0, 3)];
            }
            const straight = (one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
            const light = (three) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, at) => sum + weight * straight(three[at] / 255), 0);
            const style = getComputedStyle(root), ground = light(rgb(style.backgroundColor));
            return ["copy", "compute", "stall", "preview", "others", "activations", "good", "warn", "bad"].filter((name) => {
                const mark = light(rgb(style.getPropertyValue(`--alv-${name}`)));
                return (Math.max(mark, ground) + 0.05) / (Math.min(mark, ground) + 0.05) < 3;
            });
        }"""
    )
    assert weak == []


@pytest.mark.parametrize("width", [400, 360, 1024])
def test_narrow_screens(visit, answers, width, tmp_path):
    panel = visit(width=width, height=800)
    fill(panel, answers)
    panel.page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    assert panel.page.evaluate("() => document.documentElement.scrollWidth") <= width
    wide = panel.page.evaluate(
        """() => {
            const root = document.querySelector("#async_lowvram"), box = root.getBoundingClientRect();
            return [...root.querySelectorAll("*")].filter((one) => one.getClientRects().length && !one.closest(".alv-spoken"))
                .filter((one) => one.getBoundingClientRect().right > box.right + 0.5 || one.scrollWidth > one.clientWidth + 1
                    && getComputedStyle(one).overflowX !== "visible" && one.clientWidth)
                .map((one) => one.className || one.tagName);
        }"""
    )
    assert wide == []


def test_long_words_do_not_widen_it(visit, answers):
    answers.status = standing_down(reason="x" * 300)
    panel = visit(width=400)
    assert panel.page.evaluate("() => document.documentElement.scrollWidth") <= 400


def test_by_keyboard_alone(visit, answers):
    """Tab reaches everything in the order it is read, Enter and Space work, and where the focus is can be seen."""
    answers.timeline = timeline()
    panel = visit()
    panel.page.focus("#async_lowvram .alv-toggle")
    toggle = panel.page.locator("#async_lowvram .alv-toggle")
    assert toggle.get_attribute("aria-expanded") == "false"
    panel.page.keyboard.press("Enter")
    assert toggle.get_attribute("aria-expanded") == "true"
    assert panel.page.locator(f"#{toggle.get_attribute('aria-controls')}").is_visible()
    panel.page.wait_for_selector("#async_lowvram .alv-canvas", state="visible")
    walked = []
    for _ in range(4):
        panel.page.keyboard.press("Tab")
        walked.append(
            panel.page.evaluate(
                """() => {
                const at = document.activeElement, style = getComputedStyle(at);
                return [at.dataset.do || at.tagName.toLowerCase(), style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
            }"""
            )
        )
    assert walked == [["try", True], ["report", True], ["canvas", True], ["summary", True]]
    panel.page.keyboard.press("Enter")
    panel.page.wait_for_selector("#async_lowvram .alv-messages", state="visible")
    toggle.focus()
    panel.page.keyboard.press("Space")
    assert not panel.shown(".alv-body")
    panel.page.keyboard.press("Tab")
    assert not panel.page.evaluate("() => document.querySelector('#async_lowvram').contains(document.activeElement)")


def test_the_line_opens_it_for_a_mouse(visit):
    panel = visit()
    panel.page.click("#async_lowvram .alv-state")
    assert panel.shown(".alv-body")
    panel.page.click("#async_lowvram .alv-name")
    assert not panel.shown(".alv-body")


def test_everything_has_a_name(visit, answers):
    """As a screen reader is told: by the browser's own computation."""
    panel = visit()
    fill(panel, answers)
    snapshot = panel.page.locator("#async_lowvram").aria_snapshot()
    for line in (
        'button "Details" [expanded]',
        'button "Try it"',
        'button "Copy report"',
        'meter "VRAM"',
        'table "512x512, batch 2 · 6 passes"',
        'application "unet: 397 ms, copying 83%',
        'rowheader "Stock"',
        'heading "VRAM 4.00 GB"',
    ):
        assert line in snapshot, line
    nameless = panel.page.evaluate(
        """() => [...document.querySelectorAll("#async_lowvram :is(button, textarea, canvas, [role=meter], [role=progressbar])")]
            .filter((one) => !(one.getAttribute("aria-label") || one.textContent).trim()).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    ids = panel.page.evaluate("() => [...document.querySelectorAll('#async_lowvram [id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids)) and all(one.startswith("async_lowvram") for one in ids)
    broken = panel.page.evaluate(
        """() => ["aria-controls", "aria-describedby"].flatMap((name) => [...document.querySelectorAll(`#async_lowvram [${name}]`)]
            .filter((one) => !document.getElementById(one.getAttribute(name))).map((one) => one.className))"""
    )
    assert broken == []


def test_a_screen_reader_hears_states_and_no_figures(visit, answers):
    panel = visit()
    panel.open()
    panel.page.evaluate(
        """() => {
            window.spoken = [];
            const hear = () => window.spoken.push(document.querySelector("#async_lowvram .alv-state").textContent);
            for (const region of document.querySelectorAll("#async_lowvram :is([role=status], [aria-live])")) {
                new MutationObserver(hear).observe(region, {childList: true, characterData: true, subtree: true, attributes: true});
            }
        }"""
    )
    for seconds in (0.4, 0.3, 0.2):
        answers.status = active(pass_seconds=seconds, efficiency=seconds)
        panel.refresh()
    assert panel.page.evaluate("() => window.spoken") == []
    answers.status = active(state="demoted", reason="a copy failed")
    panel.refresh()
    assert panel.page.evaluate("() => window.spoken") == ["Gave way to stock: a copy failed"]
    live = panel.page.eval_on_selector_all("#async_lowvram :is([role=status], [aria-live])", "(all) => all.map((one) => one.className)")
    assert sorted(live) == ["alv-notice", "alv-said", "alv-spoken", "alv-state", "alv-trial-state"]


def test_states_differ_in_shape(visit, answers):
    """Not by colour alone: also the words say it, and the mark is of another form."""
    forms = set()
    for status in (active(), active(state="learning"), standing_down(), active(state="demoted", reason="x"), 500):
        answers.status = status
        panel = visit()
        forms.add(
            panel.page.eval_on_selector(
                "#async_lowvram .alv-dot",
                """(dot) => {
                const style = getComputedStyle(dot), filled = style.backgroundColor !== "rgba(0, 0, 0, 0)";
                return [style.borderRadius, style.transform, filled, style.backgroundImage.startsWith("linear")].join();
            }""",
            )
        )
    assert len(forms) == 5


def test_no_motion_where_none_is_wanted(visit):
    moves = (
        "() => [...document.querySelectorAll('#async_lowvram *')].some((one) => parseFloat(getComputedStyle(one).transitionDuration) > 0)"
    )
    assert visit().page.evaluate(moves) is True
    assert visit(reduced_motion="reduce").page.evaluate(moves) is False
