"""Two models asked the same question about the same clip: side by side on the page, and in what is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from engine.methods.method import META
from tests.browser.test_page import SIZES, fits, pick, think
from tests.serve import Server, served, untrained

ANOTHER = "another"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A page whose visitors may compare its model with an untrained one."""
    folder = tmp_path_factory.mktemp("compare")
    other = untrained(folder / "other")
    meta = json.loads((other / META).read_text(encoding="utf-8"))
    (other / META).write_text(json.dumps(meta | {"name": ANOTHER}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPARE_ID", str(other))
        with served(folder) as opened:
            yield opened


@pytest.mark.parametrize("page", [{"viewport": size} for size in SIZES], indirect=True, ids=["desktop", "phone"])
def test_two_models_answer_side_by_side(page: Page, tmp_path: Path) -> None:
    pick(page)
    page.locator("#other input").click()
    page.get_by_role("option", name=ANOTHER).click()
    think(page)
    table = page.locator("#compared table")
    expect(table.locator("th[scope=col]")).to_have_count(2)
    expect(table.locator("th[scope=col]").nth(1)).to_have_text(ANOTHER)
    row = table.locator("tr", has=page.locator("th[scope=row]", has_text="Silent answer"))
    assert row.locator("b").first.inner_text() == page.locator(".s-answers .s-big").first.inner_text()
    options = page.locator("#options textarea").input_value().splitlines()
    assert row.locator("b").nth(1).inner_text() in options
    felt = table.locator("tr", has=page.locator("th[scope=row]", has_text="Do its slots matter?")).locator("td")
    assert all(words.startswith("The slots ") for words in felt.all_inner_texts())
    assert fits(page)
    assert table.locator("em").count() == 0
    page.locator("#reveal").click()
    expect(row.locator("em.s-right, em.s-wrong")).to_have_count(2)

    with page.expect_download() as download:
        page.locator("#download").click()
    kept = tmp_path / "reply.json"
    download.value.save_as(kept)
    other = json.loads(kept.read_text())["compared"]
    assert other["settings"]["model"] == ANOTHER
    assert {"changes", "looked", "lens", "collapse", "fewer_slots"} <= set(other["inside"])
