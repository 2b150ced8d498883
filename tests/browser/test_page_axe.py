"""axe-core finds nothing on a page that keeps a reader out, in light and dark."""

from __future__ import annotations

from typing import Any

import pytest
from lib.browser.page_files import PAGES

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_fault(name: str, made: Any, watch: Any) -> None:
    """Nor in the colours of the dark page."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs pip install '.[browser]'").Axe()
    page = watch.open(made.small_page(name))
    if page.locator(".grid [data-row]").count():
        page.locator(".grid [data-row]").first.click()
    found = axe.run(page).response["violations"]
    page.emulate_media(color_scheme="dark")
    found += axe.run(page, options={"runOnly": ["color-contrast"]}).response["violations"]
    told = [f"{each['impact']}: {each['help']}: {[node['target'] for node in each['nodes']][:3]}" for each in found]
    assert told == []
