"""The page on a free port, and a Chromium that opens it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser.find import find_browser
from tests.serve import Server, served

QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
TRIMMING = "dynamically imported module: blob:"  # Gradio looks for its tools, which the page refuses


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("page")) as opened:
        yield opened


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """Playwright runs an event loop in this thread; it ends with the module, so that other tests can run their own."""
    path = find_browser()
    expect.set_options(timeout=60_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(request: pytest.FixtureRequest, chromium: Browser, server: Server) -> Iterator[Page]:
    """The open page. A test chooses its looks by parametrizing this fixture with options of `new_context`.

    Afterwards: nothing was asked of any other host, no script failed, and the server's log has no traceback of this test.
    """
    options = {"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})}
    context = chromium.new_context(**options)
    context.set_default_timeout(60_000)
    opened = context.new_page()
    outside: list[str] = []
    failed: list[str] = []
    before = len(server.log.read_text())
    opened.on("request", lambda r: None if r.url.startswith((server.url, "data:", "blob:")) else outside.append(r.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.goto(server.url)
    opened.wait_for_selector("#think")
    yield opened
    context.close()
    assert not outside
    assert all(TRIMMING in error for error in failed)
    assert "Traceback" not in server.log.read_text()[before:]
