"""A browser with the panel in it, and the server it asks. Skipped where gradio, playwright or Chromium are not installed.

Run them by `python -m pytest --confcutdir=tests/panel tests/panel` in an environment with the `browser` extra: it pins what the WebUI pins,
which the other tests do not need, and needs no torch, which their conftest.py imports.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("gradio", "playwright", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
NAME = "webui.test"
WHY = f"not installed: {', '.join(MISSING)} (the browser extra)" if MISSING else "" if CHROMIUM else "Chromium is not installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By a mark, so that they are told as one line for each file."""
    for item in items:
        if WHY and {"chromium", "served"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason=WHY))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, as root must: everything it opens is ours. NAME is this machine, but no "secure context", as in a home network.
        switches = ["--no-sandbox", "--disable-gpu", f"--host-resolver-rules=MAP {NAME} 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=switches)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def served() -> Iterator[Any]:
    """The server at the address's root. Its answers are shared: `answers` gives each test fresh ones."""
    from panel_app import Answers, Server

    answers = Answers()
    server = Server(answers)
    yield server, answers
    server.close()


@pytest.fixture
def answers(served: Any) -> Iterator[Any]:
    """What the server answers in this test: a working extension that nobody uses just now."""
    from panel_examples import active

    shared = served[1]
    shared.reset()
    shared.status = active()
    yield shared
    if shared.held is not None:
        shared.held.set()


@pytest.fixture
def visit(chromium: Any, served: Any, answers: Any) -> Iterator[Callable[..., Any]]:
    """visit(...) -> a `Visit` of the page. Keyword arguments: those of panel_visit.Visit; `named`: by a name that is not localhost."""
    from panel_visit import Visit

    made: list[Any] = []

    def go(**how: Any) -> Any:
        address = how.pop("address", served[0].address)
        if how.pop("named", False):
            address = address.replace("127.0.0.1", NAME)
        visit = Visit(chromium, address, answers, **how)
        made.append(visit)
        return visit

    yield go
    for one in made:
        one.close()
