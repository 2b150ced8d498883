"""The grid of a page: a cell tells its value to the mouse and to the keyboard, and its row is drawn as curves."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from lib.browser.sheets import SheetOnPage

pytestmark = pytest.mark.browser

GRIDS = [
    "merge",
    "extract",
    "diff",
    "diff-several",
    "diff-models",
    "inspect",
    "inspect-spectra",
    "verify-wrong",
    "resize",
]
CURVES = ["diff", "inspect-spectra", "extract", "resize"]


def tells(sheet: SheetOnPage, row: str, title: str) -> bool:
    """Return whether the page says the name of a row, and then its number in a column, as they stand in the table."""
    name, text = sheet.find(row, title)
    first, _, rest = sheet.reading.partition("\n")
    return first.startswith(name) and f"{title} {text}" in rest


@pytest.mark.parametrize("name", GRIDS)
def test_a_cell_tells_its_number_on_hover_and_on_focus(name: str, made: Any, watch: Any) -> None:
    sheet = SheetOnPage(watch.open(made.page(name)))
    cells = sheet.cells.all()
    assert len(cells) > 100
    title = sheet.colour
    for cell in cells[:: len(cells) // 4]:
        row = cell.get_attribute("data-row")
        cell.hover()
        assert tells(sheet, row, title), (sheet.reading, sheet.find(row, title))
    for cell in cells[1 :: len(cells) // 4]:
        cell.focus()
        assert tells(sheet, cell.get_attribute("data-row"), title)


def focused(sheet: SheetOnPage) -> str:
    return str(sheet.page.evaluate("document.activeElement.dataset.row"))


def test_arrows_go_from_cell_to_cell(made: Any, watch: Any) -> None:
    """To the cells beside it, which lie there; Tab leaves the grid, of which one cell alone is in its order."""
    sheet = SheetOnPage(watch.open(made.page("merge")))
    order = [cell.get_attribute("tabindex") for cell in sheet.cells.all()]
    assert order.count("0") == 1
    first = sheet.section.locator('.grid [data-row][tabindex="0"]')
    first.focus()
    place = first.bounding_box()
    walked = [focused(sheet)]
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        sheet.page.keyboard.press(key)
        walked.append(focused(sheet))
        assert tells(sheet, walked[-1], sheet.colour)
    assert walked[0] == walked[-1] and len(set(walked)) == 4
    assert sheet.section.locator('.grid [data-row][tabindex="0"]').bounding_box() == place
    sheet.page.keyboard.press("Tab")
    assert sheet.page.evaluate("document.activeElement.closest('.grid')") is None


def test_a_cell_tells_its_number_where_focus_scrolls_to_it(made: Any, watch: Any) -> None:
    sheet = SheetOnPage(watch.open(made.page("merge"), width=360, height=500))
    sheet.page.evaluate("scrollTo(0, 0)")
    sheet.section.locator('.grid [data-row][tabindex="0"]').focus()
    for _ in range(6):
        sheet.page.wait_for_timeout(100)  # scrolling ends in a later frame
        assert sheet.section.locator("output.reading").is_visible() and tells(sheet, focused(sheet), sheet.colour)
        sheet.page.keyboard.press("ArrowRight")


def fills(sheet: SheetOnPage) -> list[str]:
    return list(sheet.cells.evaluate_all("cells => cells.map(cell => getComputedStyle(cell).fill)"))


@pytest.mark.parametrize("name", ["merge", "diff"])
def test_another_column_colours_it(name: str, made: Any, watch: Any) -> None:
    sheet = SheetOnPage(watch.open(made.page(name)))
    assert len(sheet.colours) > 1
    before = {sheet.colour: fills(sheet)}
    seen = {}
    for title in sheet.colours:
        sheet.colour = title
        seen[title] = fills(sheet)
        cell = sheet.cells.nth(5)
        cell.hover()
        assert tells(sheet, cell.get_attribute("data-row"), title)
    assert before.items() <= seen.items() and len(set(map(tuple, seen.values()))) > 1


def test_greater_numbers_have_other_colours_than_lesser(made: Any, watch: Any) -> None:
    """The colours follow the numbers: equal ones are equal, and lightness goes one way."""
    sheet = SheetOnPage(watch.open(made.page("merge")))
    rows = [cell.get_attribute("data-row") for cell in sheet.cells.all()]
    place = sheet.titles.index(sheet.colour)
    numbers = {each["row"]: each["cells"][place]["value"] for each in sheet.rows()}
    light = [
        sum(w * int(c) for w, c in zip((0.21, 0.72, 0.07), re.findall(r"\d+", fill), strict=False))
        for fill in fills(sheet)
    ]
    pairs = sorted((float(numbers[row]), value) for row, value in zip(rows, light, strict=True) if numbers[row])
    steps = [two[1] - one[1] for one, two in pairwise(pairs)]
    assert all(step >= -1 for step in steps) or all(step <= 1 for step in steps)


@pytest.mark.parametrize("name", CURVES)
def test_a_chosen_cell_draws_its_curves(name: str, made: Any, watch: Any) -> None:
    sheet = SheetOnPage(watch.open(made.page(name)))
    curves = sheet.section.locator(".curves")
    seen = []
    for place in (0, 40):
        sheet.cells.nth(place).click()
        seen.append(curves.inner_html())
        row = sheet.cells.nth(place).get_attribute("data-row")
        assert sheet.find(row, sheet.colour)[0] in sheet.section.locator(".chosen").inner_text()
    assert seen[0] != seen[1] and curves.locator("svg path").count() > 0
    sheet.cells.nth(0).focus()
    sheet.page.keyboard.press("Enter")
    assert curves.inner_html() == seen[0]


def test_parts_of_a_model_are_chosen(made: Any, watch: Any) -> None:
    sheet = SheetOnPage(watch.open(made.page("inspect-parts")))
    part = sheet.section.locator("select.part")
    names = part.locator("option").all_inner_texts()
    assert len(names) > 1
    seen = []
    for name in names:
        part.select_option(label=name)
        seen.append([cell.get_attribute("data-row") for cell in sheet.cells.all()])
    assert len(set(map(tuple, seen))) == len(names)


def test_a_page_of_one_part_has_no_choice_of_parts(made: Any, watch: Any) -> None:
    sheet = SheetOnPage(watch.open(made.page("merge")))
    assert sheet.section.locator(".part").locator("visible=true").count() == 0
