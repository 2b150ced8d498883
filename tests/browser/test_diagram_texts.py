"""The texts of a diagram, in this machine's fonts, are inside it and apart from each other."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import FIXTURES
from lib.browser.page_files import pictures

pytestmark = pytest.mark.browser

# texts of an SVG: those that leave it, and pairs that meet
MISPLACED = """() => {
  const svg = document.querySelector("svg"), box = svg.viewBox.baseVal;
  const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBBox()]);
  const outside = texts.filter(
    ([, b]) => b.x < 4 || b.y < 4 || b.x + b.width > box.width - 4 || b.y + b.height > box.height - 4);
  const meet = (a, b) => a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height;
  const pairs = texts.flatMap(
    ([one, a], i) => texts.slice(i + 1).filter(([, b]) => meet(a, b)).map(([two]) => [one, two]));
  return [...outside.map(([text]) => text), ...pairs];
}"""


@pytest.mark.parametrize("name", pictures.diagrams.DIAGRAMS)
def test_no_text_leaves_it_or_meets_another(name: str, browser: Any) -> None:
    page = browser.new_page()
    page.set_content((FIXTURES / "pictures" / f"{name}.svg").read_text(encoding="utf-8"))
    assert page.evaluate(MISPLACED) == []
    page.close()
