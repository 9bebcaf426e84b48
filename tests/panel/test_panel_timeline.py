"""The timeline: drawn in its lanes, sharp, told under the pointer, by keys and in a sentence."""

from __future__ import annotations

import pytest
from panel_examples import timeline

CANVAS = "#async_lowvram .alv-canvas"
LANE = 24


@pytest.fixture
def drawn(visit, answers):
    def go(**how):
        answers.timeline = timeline()
        panel = visit(**how)
        panel.open()
        panel.page.wait_for_selector(CANVAS, state="visible")
        panel.settle()
        panel.page.locator(CANVAS).scroll_into_view_if_needed()
        return panel

    return go


def pixels(panel, seconds, lane):
    """{colour} within the lane's row at that time, as #rrggbb."""
    return set(
        panel.page.evaluate(
            """([seconds, lane]) => {
            const canvas = document.querySelector("#async_lowvram .alv-canvas"), ours = window.asyncLowvram;
            const place = ours.timelineGeometry(ours.readTimeline(ours.client.model.timeline), canvas.clientWidth);
            const scale = canvas.width / canvas.clientWidth, top = place.lanes[lane].top, high = place.lanes[lane].height;
            const x = Math.floor(place.x(seconds) * scale);
            const data = canvas.getContext("2d").getImageData(x, Math.ceil((top + 4) * scale), 1, Math.floor((high - 8) * scale)).data;
            const found = [];
            for (let i = 0; i < data.length; i += 4) {
                const hex = [...data.slice(i, i + 3)].map((one) => one.toString(16).padStart(2, "0")).join("");
                found.push(data[i + 3] === 255 ? `#${hex}` : "lane");
            }
            return found;
        }""",
            [seconds, lane],
        )
    )


def colour(panel, name):
    return panel.page.eval_on_selector("#async_lowvram", f"(root) => getComputedStyle(root).getPropertyValue('--alv-{name}').trim()")


def middle(lane, number):
    spans = [span for span in timeline()["spans"] if span["lane"] == lane]
    return (spans[number]["start"] + spans[number]["end"]) / 2


@pytest.mark.parametrize("dark", [False, True])
def test_each_lane_has_its_spans(drawn, dark):
    panel = drawn(dark=dark)
    for lane, number in (("copy", 0), ("copy", 5), ("compute", 0), ("compute", 9), ("preview", 0)):
        assert pixels(panel, middle(lane, number), lane) == {colour(panel, lane)}, (lane, number)
    assert pixels(panel, 0.3, "preview") == {"lane"}
    assert pixels(panel, middle("copy", 9) + 0.03, "copy") == {"lane"}
    # A stall is in the compute lane, of a colour of its own, and hatched.
    stall = pixels(panel, middle("stall", 1), "compute")
    assert colour(panel, "stall") in stall and len(stall) > 1


def test_the_pass_has_an_end_and_a_start(drawn):
    """A copy issued ahead lies before the start: both are marked through all lanes."""
    panel = drawn()
    end = timeline()["seconds"]
    for seconds in (0, end * 0.99999):
        marked = pixels(panel, seconds, "preview")
        assert marked and "lane" not in marked, seconds


@pytest.mark.parametrize("scale", [1, 2, 1.5])
def test_sharp_on_any_screen(drawn, scale):
    panel = drawn(scale=scale)
    size = panel.page.eval_on_selector(CANVAS, "(canvas) => [canvas.width, canvas.height, canvas.clientWidth, canvas.clientHeight]")
    assert size[0] == pytest.approx(size[2] * scale, abs=1) and size[1] == pytest.approx(size[3] * scale, abs=1)


def test_drawn_anew_when_the_window_or_the_theme_changes(drawn):
    panel = drawn()
    panel.page.set_viewport_size({"width": 700, "height": 900})
    panel.wait_until(f"() => {{ const canvas = document.querySelector('{CANVAS}'); return canvas.width === canvas.clientWidth; }}")
    assert pixels(panel, middle("copy", 5), "copy") == {colour(panel, "copy")}
    light = colour(panel, "copy")
    panel.page.evaluate("() => document.body.classList.add('dark')")
    assert colour(panel, "copy") != light
    assert pixels(panel, middle("copy", 5), "copy") == {colour(panel, "copy")}


def hover(panel, seconds, lane):
    x = panel.page.evaluate(
        f"""(seconds) => {{
            const ours = window.asyncLowvram, canvas = document.querySelector("{CANVAS}");
            return ours.timelineGeometry(ours.readTimeline(ours.client.model.timeline), canvas.clientWidth).x(seconds);
        }}""",
        seconds,
    )
    panel.page.locator(CANVAS).hover(position={"x": x, "y": {"copy": 0.5, "compute": 1.5, "preview": 2.5}[lane] * LANE})


def test_told_under_the_pointer(drawn):
    panel = drawn()
    hover(panel, middle("copy", 2), "copy")
    assert panel.text(".alv-readout") == "copy: unet.input_blocks.2.0.in_layers.2 · 36.0 ms · 82 MB · at 46.0 ms"
    hover(panel, middle("stall", 1), "compute")
    assert panel.text(".alv-readout").startswith("GPU waits: unet.input_blocks.7.0.in_layers.2 · 8.00 ms")
    hover(panel, middle("preview", 0), "preview")
    assert panel.text(".alv-readout") == "preview: vae · 100 ms · 20 MB · at 100 ms"
    panel.page.mouse.move(0, 0)
    assert panel.text(".alv-readout").startswith("unet: ")


def test_walked_by_keys(drawn):
    panel = drawn()
    panel.page.focus(CANVAS)
    told = []
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "ArrowDown", "End", "ArrowRight", "ArrowDown", "Home"):
        panel.page.keyboard.press(key)
        told.append(panel.text(".alv-readout").split(" · ")[0])
    name = "unet.input_blocks.{}.0.in_layers.2".format
    assert told == [
        f"compute: {name(0)}",
        f"compute: {name(1)}",
        f"copy: {name(2)}",
        f"compute: {name(1)}",
        f"compute: {name(9)}",
        f"compute: {name(9)}",
        "preview: vae",
        "preview: vae",
    ]
    assert panel.page.locator("#async_lowvram .alv-spoken").inner_text() == panel.text(".alv-readout")
    assert panel.page.get_attribute("#async_lowvram .alv-spoken", "aria-live") == "polite"
    panel.page.keyboard.press("Escape")
    assert panel.text(".alv-readout").startswith("unet: ")


def test_escape_does_not_reach_the_webui(drawn):
    """There it interrupts the picture in the making."""
    panel = drawn()
    panel.page.evaluate("() => { window.heard = 0; document.addEventListener('keydown', () => { window.heard += 1; }); }")
    panel.page.focus(CANVAS)
    panel.page.keyboard.press("ArrowRight")
    heard = panel.page.evaluate("() => window.heard")
    panel.page.keyboard.press("Escape")
    assert panel.page.evaluate("() => window.heard") == heard


def test_in_a_sentence(drawn):
    panel = drawn()
    sentence = (
        "unet: 397 ms, copying 83% of the pass, computing 96%, 2 stalls, longest 8.00 ms at unet.input_blocks.7.0.in_layers.2, 1 preview"
    )
    assert panel.page.get_attribute(CANVAS, "aria-label") == sentence
    assert panel.text(".alv-readout") == sentence
    assert "2.40 s ago" in panel.text(".alv-timeline .alv-heading")


@pytest.mark.parametrize(
    "answer",
    [
        {"schema": 1, "network": None, "seconds": 0, "spans": []},
        404,
        500,
        {"schema": 1, "network": "unet", "seconds": None, "spans": None},
    ],
)
def test_none(visit, answers, answer):
    answers.timeline = answer
    panel = visit()
    panel.open()
    panel.settle()
    assert not panel.shown(".alv-canvas")
    assert "No pass has been timed yet" in panel.text(".alv-timeline")


def test_spans_that_make_no_sense_are_left_out(visit, answers):
    good = timeline()
    bad = [{"lane": "toString", "name": "x", "start": 0, "end": 1}, {"lane": "copy", "start": 2, "end": 1}, None, {"lane": "copy"}]
    answers.timeline = {**good, "spans": [*bad, *good["spans"]]}
    panel = visit()
    panel.open()
    panel.settle()
    assert panel.text(".alv-readout").startswith("unet: 397 ms, copying 83%")


def test_many_spans(visit, answers):
    """As many as the leaves of an SDXL UNet: drawn, and each still at least a pixel of the screen."""
    both = [(lane, n / 3000) for n in range(3000) for lane in ("copy", "compute")]
    spans = [{"lane": lane, "name": f"leaf {start}", "start": start, "end": start + 1e-5, "bytes": 1} for lane, start in both]
    answers.timeline = {"schema": 1, "network": "unet", "seconds": 1.0, "spans": spans, "age_seconds": 0.0}
    panel = visit()
    panel.open()
    panel.settle()
    assert pixels(panel, 0.5, "compute") == {colour(panel, "compute")}
