"""The line as visitors see it: their place while they wait, and a word when it is full."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.browser.test_page import pick, think
from tests.serve import Server, decoders, served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A page where one may wait."""
    with served(tmp_path_factory.mktemp("line"), LINE=1, READING=3600.0) as opened:
        yield opened


def come(page: Page, server: Server) -> Page:
    """Another visitor, who asks about an example."""
    visitor = page.context.new_page()
    visitor.goto(server.url)
    pick(visitor)
    visitor.locator("#think").click()
    return visitor


def test_who_waits_is_told_the_place_and_who_cannot_that_the_page_is_busy(page: Page, server: Server) -> None:
    pick(page)
    think(page)
    (decoder,) = decoders(server)
    decoder.send_signal(signal.SIGSTOP)  # and so the next one is at work until we say
    page.locator("#think").click()
    expect(page.locator(".s-progress")).to_be_visible()
    waiting = come(page, server)
    told = waiting.locator("#status .progress-text")
    expect(told).to_contain_text(re.compile(r"queue: 1/1"))
    assert "Busy" in told.evaluate("element => getComputedStyle(element, '::before').content")
    assert told.bounding_box()["height"] > 15
    refused = come(page, server)
    expect(refused.locator(".toast-body")).to_contain_text("busy")
    expect(refused.locator("#think")).to_be_enabled()  # to try again
    expect(waiting.locator(".s-answers")).not_to_be_visible()
    decoder.send_signal(signal.SIGCONT)
    expect(waiting.locator(".s-answers")).to_be_visible()
    think(refused)
