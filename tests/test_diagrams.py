"""The diagrams of README and guides: drawn from the numbers of now, small, and readable by eye and by ear."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import FIXTURES, ROOT

sys.path.insert(0, str(FIXTURES))

import diagrams

FOLDER = FIXTURES / "pictures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "loratool" / "guides").glob("*.md"))]
SHOWN = [
    found
    for page in PAGES
    for found in re.findall(r"!\[(.*)\]\(\S*fixtures/pictures/([a-z]+)\.svg\)", page.read_text())
]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_files_are_what_the_script_draws() -> None:
    drawn = diagrams.draw()
    assert [
        name for name, text in drawn.items() if (FOLDER / f"{name}.svg").read_text(encoding="utf-8") != text
    ] == [], f"python fixtures/pictures.py {' '.join(drawn)}"


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_a_file_is_small_and_tells_what_it_shows(name: str) -> None:
    text = (FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    svg = ElementTree.fromstring(text)
    assert len(text.encode()) < 12_000 and int(svg.attrib["width"]) <= 800
    labels = [svg.find(f"{SVG}{tag}") for tag in ("title", "desc")]
    assert svg.attrib["role"] == "img" and all(label is not None and label.text for label in labels)
    assert svg.attrib["aria-labelledby"].split() == [label.attrib["id"] for label in labels if label is not None]
    assert svg.findall(f"{SVG}text") and "prefers-color-scheme:dark" in text
    assert not re.search(r"(?:href|src|url)[=(]['\"]?(?!#)", text), "nothing is fetched"


@pytest.mark.parametrize("name", diagrams.DIAGRAMS)
def test_a_page_shows_it_with_its_numbers_in_words(name: str) -> None:
    """The words are all that a terminal and a screen reader get."""
    words = [alt for alt, shown in SHOWN if shown == name]
    description = ElementTree.parse(FOLDER / f"{name}.svg").findtext(f"{SVG}desc") or ""
    assert words and all(len(each) > 40 for each in words)
    for each in words:
        assert set(re.findall(r"\d+", each)) <= set(re.findall(r"\d+", description))


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("role", diagrams.TEXTS)
def test_text_stands_out(role: str, mode: int) -> None:
    """By the 4.5 of WCAG, on every ground that texts have."""

    def luminance(role: str) -> float:
        channels = [int(diagrams.COLOURS[role][mode][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(c * weight for c, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))

    for ground in ("ground", "panel", "tint"):
        low, high = sorted((luminance(role), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, ground
