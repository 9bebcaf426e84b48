"""One visit of the page by a browser: opening it, what a user does, and what the panel shows.

Errors of scripts fail the test when the visit ends. Only the test's own server is reachable (gradio's page asks for fonts elsewhere).
Waiting is always for a condition; where time matters, it is the page's, set by the test (`clock=True`).
"""

from __future__ import annotations

import re
from typing import Any

PANEL = "#async_lowvram"


class Visit:
    """`width`, `height`: of the window, CSS pixels. `scale`: device pixels for each. `clock`: timers run only by `pass_time`.
    `before`: a script that runs before all others. `wait`: for the first answer."""

    def __init__(
        self,
        browser: Any,
        address: str,
        answers: Any,
        *,
        width: int = 1200,
        height: int = 900,
        scale: float = 1,
        dark: bool = False,
        clock: bool = False,
        before: str = "",
        wait: bool = True,
        permissions: list[str] | None = None,
        reduced_motion: str = "no-preference",
    ) -> None:
        self.answers, self.errors, self.sent = answers, [], []
        self.context = browser.new_context(
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
            reduced_motion=reduced_motion,
            permissions=permissions or [],
        )
        page = self.page = self.context.new_page()
        self.context.set_default_timeout(20_000)
        origin = re.match(r"https?://[^/]+", address).group()
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(origin) else route.abort())
        # What the browser sent; the server may not have counted it yet.
        page.on("request", lambda request: self.sent.append(request.url.rsplit("/", 1)[-1]))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        if clock:
            page.clock.install(time=0)
        if before:
            page.add_init_script(before)
        page.goto(address + ("?__theme=dark" if dark else "?__theme=light"))
        if wait:
            page.wait_for_selector(PANEL, state="attached")
            page.wait_for_selector(f"{PANEL}:not([data-state=asking])", state="attached")
            self.settle()
            if clock:  # it ran until here: Gradio builds the page by timers
                page.clock.pause_at(page.evaluate("() => Date.now()") + 1000)
                self.settle()

    def close(self) -> None:
        self.context.close()
        assert not self.errors, self.errors

    # What a user does

    def tab(self, name: str) -> None:
        self.page.locator("#tabs > .tab-nav > button", has_text=name).click()
        self.page.wait_for_selector(f"#tab_{name.lower()}", state="visible")

    def open(self) -> None:
        self.page.click(".alv-toggle")
        self.page.wait_for_selector(".alv-body", state="visible")

    def refresh(self) -> None:
        """A new answer now."""
        with self.page.expect_event("request", lambda request: request.url.endswith("/status")):
            self.page.evaluate("() => window.asyncLowvram.client.refresh()")
        self.settle()

    def job(self, runs: bool) -> None:
        """The WebUI's progress bar comes or goes."""
        self.page.evaluate(
            """(runs) => {
                const gallery = document.querySelector("#txt2img_gallery_container");
                if (runs) gallery.before(Object.assign(document.createElement("div"), {className: "progressDiv"}));
                else document.querySelector(".progressDiv").remove();
            }""",
            runs,
        )

    def hide_page(self, hidden: bool) -> None:
        """Another tab of the browser is looked at, as far as scripts can tell."""
        self.page.evaluate(
            """(hidden) => {
                Object.defineProperty(document, "visibilityState", {configurable: true, get: () => (hidden ? "hidden" : "visible")});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            hidden,
        )

    # What happens

    def pass_time(self, milliseconds: int) -> None:
        """Let the page's timers run, second by second, each with its answers come."""
        for _ in range(milliseconds // 1000):
            self.page.clock.run_for(1000)
            self.settle()

    def settle(self) -> None:
        """Until no request of the panel is on its way."""
        self.wait_until("() => !window.asyncLowvram.client.asking")

    def wait_for_sight(self, seen: bool) -> None:
        """Until the panel knows that it can be seen, or not, and has asked what it asks then."""
        self.wait_until("(seen) => window.asyncLowvram.client.sight === seen && !window.asyncLowvram.client.asking", seen)

    def wait_until(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument, polling=20)

    @property
    def has_timer(self) -> bool:
        return self.page.evaluate("() => window.asyncLowvram.client.waiting")

    # What is seen

    def text(self, selector: str) -> str:
        return " ".join(self.page.locator(f"{PANEL} {selector}").inner_text().split())

    def texts(self, selector: str) -> list[str]:
        return [" ".join(text.split()) for text in self.page.locator(f"{PANEL} {selector}").all_inner_texts()]

    def shown(self, selector: str) -> bool:
        return self.page.locator(f"{PANEL} {selector}").is_visible()

    @property
    def state(self) -> str:
        return self.page.get_attribute(PANEL, "data-state")

    def wait_for_text(self, selector: str, text: str) -> None:
        self.page.locator(f"{PANEL} {selector}", has_text=text).first.wait_for(state="visible")

    def fact(self, name: str) -> str:
        return self.text(f"[data-fact={name}] dd")
