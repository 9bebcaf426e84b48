"""The report: complete, on the clipboard or at least on the screen, and without prompts, paths, addresses and names of computers."""

from __future__ import annotations

import pytest
from panel_examples import active, trial

SECRETS = {
    "prompt": "a portrait of Anna Example, oil on canvas",
    "negative": "blurry, ugly, secretword",
    "windows": r"C:\Users\Anna\models\secretmodel.safetensors",
    "unix": "/home/anna/secretmodel.safetensors",
    "address": "http://192.168.17.23:7860/secretroute?x=1",
}


@pytest.fixture
def told(visit, answers):
    """report(**how) of a page with secrets in every place that the report could take one from."""

    def go(**how):
        said = " and ".join([*SECRETS.values(), *(["webui.test"] if how.get("named") else [])])
        answers.status = active(
            reason=said,
            last_error=said,
            device=f"GPU of {SECRETS['unix']}",
            messages=[{"at": 1700000000, "level": "error", "text": f"it failed: ```{said}```", "count": 2}],
            advices=[{"id": "x", "text": "Look at {what}.", "values": {"what": SECRETS["unix"]}}],
            prompt=SECRETS["prompt"],
            checkpoint_path=SECRETS["unix"],
            networks={"unet": {"file": SECRETS["windows"], "passes": 3}},
            trial=trial("failed", 0.5, said),
        )
        panel = visit(permissions=["clipboard-read", "clipboard-write"] if not how.get("named") else [], **how)
        panel.page.fill("#txt2img_prompt textarea", SECRETS["prompt"])
        panel.page.evaluate(
            """() => {
                window.opts = {async_lowvram_enabled: true, async_lowvram_budget_mb: 1200, batch_cond_uncond: false,
                               outdir_samples: "/home/anna",
                               samples_filename_pattern: "[prompt]", cross_attention_optimization: "Automatic"};
                const box = document.createElement("div");
                box.id = "img2img_neg_prompt";
                box.append(Object.assign(document.createElement("textarea"), {value: "blurry, ugly, secretword"}));
                document.body.append(box);
            }"""
        )
        panel.open()
        panel.page.click("#async_lowvram [data-do=report]")
        return panel

    return go


def check(text):
    for what, secret in SECRETS.items():
        assert secret not in text, what
    for part in ("Anna", "anna", "secret", "webui.test", "192.168", "safetensors", "outdir", "example.invalid", "6ce0161689", "127.0.0.1"):
        assert part not in text, part
    assert text.count("```") == 6


def test_on_the_clipboard(told):
    panel = told()
    panel.wait_for_text(".alv-said", "Copied")
    text = panel.page.evaluate("() => navigator.clipboard.readText()")
    check(text)
    for line in (
        "### Async LowVRAM report",
        "- version: 1.0.0, schema 1",
        "- host: version: v1.10.1, python: 3.10.6, torch: 2.1.2+cu121, xformers: N/A, gradio: 3.41.2",
        "- device: GPU of <path>",
        "async_lowvram_budget_mb: 1200",
        "async_lowvram_enabled: true",
        "batch_cond_uncond: false",
        "cross_attention_optimization: Automatic",
        "budget_bytes: 1258291200",
        "pass_seconds: 0.412",
        "disk: not known",
        "vram.total: 4294967296",
        "networks.unet.passes: 3",
        "worst_stall.unit: unet.input_blocks.1.0.in_layers.2",
        "- advice: Look at <path>.",
    ):
        assert line in text.split("\n"), line
    assert "- state: active: <prompt> and <prompt> and <path>" in text
    assert "2023-11-14T22:13:20.000Z error: it failed:" in text and "(2 times)" in text
    assert panel.page.evaluate("() => navigator.userAgent") in text
    assert not panel.shown(".alv-report")


def test_it_is_in_english_in_any_language(told, answers):
    answers.localization = {"Look at {what}.": "Sieh {what} an.", "Copy report": "Bericht kopieren"}
    panel = told()
    assert panel.text("[data-do=report]") == "Bericht kopieren"
    panel.page.wait_for_function("() => document.querySelector('#async_lowvram .alv-said').textContent")
    assert "- advice: Look at <path>." in panel.page.evaluate("() => navigator.clipboard.readText()")


def test_in_a_home_network(told):
    """Neither https nor localhost: no navigator.clipboard; the old way does it."""
    panel = told(named=True)
    assert not panel.page.evaluate("() => window.isSecureContext")
    panel.wait_for_text(".alv-said", "Copied")
    assert not panel.shown(".alv-report")
    panel.page.fill("#txt2img_prompt textarea", "")
    panel.page.focus("#txt2img_prompt textarea")
    panel.page.keyboard.press("Control+V")
    text = panel.page.input_value("#txt2img_prompt textarea")
    assert text.startswith("### Async LowVRAM report")
    check(text)


def test_where_nothing_may_copy(told):
    """The text is shown and selected, and the panel says what to do."""
    panel = told(named=True, before="document.execCommand = () => false;")
    panel.wait_for_text(".alv-said", "copy the text below by hand")
    box = panel.page.locator("#async_lowvram .alv-report")
    assert box.is_visible() and box.get_attribute("aria-label") == "Report"
    check(box.input_value())
    assert box.evaluate("(box) => box.selectionEnd - box.selectionStart === box.value.length")


def test_a_clipboard_that_refuses(told):
    panel = told(before="navigator.clipboard.writeText = () => Promise.reject(new Error('no'));")
    panel.wait_for_text(".alv-said", "Copied")


def test_without_the_extension(visit, answers):
    answers.status = 404
    panel = visit(permissions=["clipboard-read", "clipboard-write"])
    panel.open()
    panel.page.click("#async_lowvram [data-do=report]")
    panel.wait_for_text(".alv-said", "Copied")
    text = panel.page.evaluate("() => navigator.clipboard.readText()")
    assert "- state: missing" in text and "- version: not known, schema not known" in text


@pytest.mark.parametrize(
    "text, clean",
    [
        ("half of 1/2 GB at 3 MB/s; and/or nothing", "half of 1/2 GB at 3 MB/s; and/or nothing"),
        ("unet.input_blocks.1.0: 12.3 ms", "unet.input_blocks.1.0: 12.3 ms"),
        ("cannot open '/srv/x.ckpt'", "cannot open '<path>'"),
        (r"cannot open D:\x\y.ckpt now", "cannot open <path> now"),
        (r"on \\server\share\x", "on <path>"),
        (r"in C:\Users\Anna Smith\models\x.ckpt: gone", "in <path> <path>: gone"),
        ("in '/home/anna smith/x.ckpt' it", "in '<path>' it"),
        ("in /home/anna smith/x.ckpt it", "in <path> <path> it"),
        ("in models/x.ckpt.", "in <path>."),
        (
            "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0",
            "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0.0.0",
        ),
        ("see https://example.org/a?b=c.", "see <address>"),
        ("file:///home/anna/x", "<address>"),
    ],
)
def test_scrub(visit, text, clean):
    assert visit().page.evaluate("(text) => window.asyncLowvram.scrub(text)", text) == clean
