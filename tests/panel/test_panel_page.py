"""Where the panel stands: above the gallery of the tab that is shown, whatever Gradio does, under any address; in the user's language."""

from __future__ import annotations

import pytest
from panel_examples import ACTIVE, active

BEFORE = "() => document.querySelector('#async_lowvram').nextElementSibling.id"


def test_seen_at_once(visit):
    """Above the result gallery, without scrolling, in one line."""
    panel = visit(width=1600, height=700)
    assert panel.page.evaluate(BEFORE) == "txt2img_results_panel"
    box = panel.page.locator("#async_lowvram").bounding_box()
    assert box["y"] + box["height"] < 700 and box["height"] < 60
    assert panel.page.locator("#async_lowvram").count() == 1


def test_it_moves_to_the_tab_that_is_shown(visit, answers):
    panel = visit()
    panel.open()
    panel.tab("img2img")
    panel.wait_until("() => document.querySelector('#async_lowvram').nextElementSibling.id === 'img2img_results_panel'")
    panel.wait_for_sight(True)
    assert panel.shown(".alv-body")
    panel.tab("Settings")
    panel.wait_for_sight(False)
    panel.tab("txt2img")
    panel.wait_until("() => document.querySelector('#async_lowvram').nextElementSibling.id === 'txt2img_results_panel'")
    panel.wait_for_sight(True)
    assert panel.page.locator("#async_lowvram").count() == 1


def test_it_comes_back_when_gradio_builds_anew(visit):
    panel = visit()
    panel.open()
    panel.page.evaluate(
        """() => {
            const old = document.querySelector("#txt2img_results"), anew = old.cloneNode(true);
            anew.querySelector("#async_lowvram").remove();
            old.replaceWith(anew);
        }"""
    )
    panel.page.wait_for_selector("#async_lowvram", state="visible")
    panel.wait_for_sight(True)
    assert panel.page.evaluate(BEFORE) == "txt2img_results_panel" and panel.shown(".alv-body")


def test_without_the_webuis_helpers(visit, answers):
    """A page that has none of its callbacks: found, followed and moved all the same."""
    answers.helpers = False
    panel = visit()
    assert panel.page.evaluate("() => typeof window.onUiLoaded") == "undefined"
    panel.tab("img2img")
    panel.wait_until("() => document.querySelector('#async_lowvram').nextElementSibling.id === 'img2img_results_panel'")
    before = answers.count("status")
    with panel.page.expect_event("requestfinished", lambda request: request.url.endswith("/status")):
        panel.job(True)
    assert answers.count("status") > before


def test_a_page_without_our_places(visit, answers):
    """Another host's: nothing is put in, nothing is asked, nothing fails."""
    panel = visit(
        before="new MutationObserver(() => document.querySelectorAll('[id$=_results]').forEach((one) => one.remove()))"
        ".observe(document, {childList: true, subtree: true});",
        wait=False,
    )
    panel.page.wait_for_selector("#txt2img_prompt")
    panel.wait_until("() => window.asyncLowvram.client")
    assert panel.page.locator("#async_lowvram").count() == 0 and answers.asked == []


def test_a_version_without_the_results_panel(visit):
    """Before 1.7 the gallery's container stands in the results itself."""
    panel = visit(
        before="new MutationObserver(() => document.querySelectorAll('[id$=_results_panel]').forEach((one) => one.removeAttribute('id')))"
        ".observe(document, {childList: true, subtree: true});"
    )
    assert panel.page.evaluate(BEFORE) == "txt2img_gallery_container"


def test_only_one_global(visit):
    panel = visit()
    ours = panel.page.evaluate("() => Object.getOwnPropertyNames(window).filter((name) => /lowvram|^alv/i.test(name))")
    assert sorted(set(ours) - {"async_lowvram"}) == ["asyncLowvram"]


def test_under_a_subpath(chromium):
    """--subpath, or a proxy: everything is asked beside the page."""
    from panel_app import Answers, Server
    from panel_visit import Visit

    answers = Answers()
    answers.status = active()
    server = Server(answers, prefix="/some/sub")
    try:
        panel = Visit(chromium, server.address, answers)
        panel.open()
        panel.settle()
        assert panel.state == "active"
        with panel.page.expect_event("requestfinished", lambda request: request.url.endswith("/trial")):
            panel.page.click("#async_lowvram [data-do=try]")
        assert {"status", "timeline", "start"} <= set(answers.asked)
        panel.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    "page, root, address",
    [
        ("/", "", "/async-lowvram/status"),
        ("/", "http://elsewhere:7860/", "/async-lowvram/status"),
        ("/sd/", "", "/sd/async-lowvram/status"),
        ("/sd/", "/sd", "/sd/async-lowvram/status"),
        ("/sd", "/sd", "/sd/async-lowvram/status"),
        ("/sd", "http://127.0.0.1/sd/", "/sd/async-lowvram/status"),
        ("/sd-other/", "/sd", "/sd-other/async-lowvram/status"),
        ("/proxied/", "/", "/proxied/async-lowvram/status"),
    ],
)
def test_addresses(visit, page, root, address):
    found = visit().page.evaluate(
        """([page, root]) => {
            window.gradio_config = {root};
            const base = document.createElement("base");
            base.href = page;
            document.head.prepend(base);
            const found = new URL(window.asyncLowvram.address("status"));
            base.remove();
            return [found.origin === location.origin, found.pathname];
        }""",
        [page, root],
    )
    assert found == [True, address]


def test_in_the_users_language(visit, answers):
    """Templates are translated before they are filled; what has no translation stays."""
    answers.localization = {
        "On: weights travel while the GPU computes": "An: Gewichte reisen, während die GPU rechnet",
        "{times} times stock": "{times}-mal so schnell",
        "Details": "Einzelheiten",
        "Copy-bound: {mb} MB more budget would save about {ms} ms per step.": "{ms} ms je Schritt weniger mit {mb} MB mehr.",
        "Took over 3 networks.": "3 Netze übernommen.",
        "Messages ({n})": "Meldungen: {n}",
        "free": "frei",
        "toString": "never",
    }
    panel = visit()
    assert panel.text(".alv-state") == "An: Gewichte reisen, während die GPU rechnet"
    assert panel.text("[data-figure=stock]") == "2.38-mal so schnell"
    assert panel.text(".alv-toggle") == "Einzelheiten"
    panel.open()
    assert panel.texts(".alv-advice li")[0] == "60 ms je Schritt weniger mit 300 MB mehr."
    assert panel.text(".alv-folded summary") == "Meldungen: 3"
    assert "frei 1.68 GB" in panel.texts(".alv-legend li")
    panel.page.click("#async_lowvram summary")
    assert panel.texts(".alv-messages .alv-text")[-1] == "3 Netze übernommen."
    assert panel.text("[data-do=try]") == "Try it"


def test_what_the_server_says_is_text(visit, answers):
    """Names of models and messages of other programs get there: never as HTML."""
    evil = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>{mb}'
    answers.status = active(
        device=evil,
        version=evil,
        network=evil,
        restart=evil,
        worst_stall={"unit": evil, "seconds": 0.001},
        advices=[{"id": "x", "text": evil, "values": {"mb": evil}}],
        messages=[{"at": 1, "level": evil, "text": evil, "count": 1}],
        trial={
            "state": "done",
            "progress": 1,
            "reason": evil,
            "result": {
                "shape": evil,
                "passes": 1,
                "stock_seconds": 1,
                "async_seconds": 1,
                "limit_seconds": None,
                "ratio": 1,
                "equal": True,
            },
        },
    )
    answers.timeline = {
        "schema": 1,
        "network": evil,
        "seconds": 1,
        "age_seconds": 0,
        "spans": [{"lane": "compute", "name": evil, "start": 0, "end": 1, "bytes": 0}],
    }
    panel = visit()
    panel.open()
    panel.settle()
    panel.page.focus("#async_lowvram .alv-canvas")
    panel.page.keyboard.press("ArrowRight")
    panel.page.click("#async_lowvram summary")
    panel.wait_for_text(".alv-messages .alv-text", "<img src=x")
    for state in ("standing_down", "demoted"):
        answers.status = {**ACTIVE, "state": state, "reason": evil}
        panel.refresh()
        assert "<img src=x" in panel.text(".alv-state")
    assert panel.page.locator("#async_lowvram img, #async_lowvram script").count() == 0
    assert panel.page.evaluate("() => window.hacked") is None
