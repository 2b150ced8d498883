"""axe-core finds nothing on a page that keeps a reader out, in light and dark."""

from __future__ import annotations

from typing import Any

import pytest
from page_files import PAGES

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_no_fault(name: str, scheme: str, made: Any, watch: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs pip install '.[browser]'").Axe()
    page = watch.open(made.page(name), color_scheme=scheme, wait=False)
    found = axe.run(page).response["violations"]
    assert [
        f"{each['impact']}: {each['help']}: {[node['target'] for node in each['nodes']][:3]}" for each in found
    ] == []
