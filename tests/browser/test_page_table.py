"""The table of a page: sorted by any column, filtered by a pattern, and copied as it is shown."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import pytest
from lib.browser.sheets import SheetOnPage

pytestmark = pytest.mark.browser


@pytest.fixture
def sheet(made: Any, watch: Any) -> SheetOnPage:
    return SheetOnPage(watch.open(made.page("merge")))


class TestSorting:
    def test_numbers_in_both_directions(self, sheet: SheetOnPage) -> None:
        before = sheet.numbers("delta/W")
        assert len(set(before)) > 100 and None not in before
        seen = {}
        for _ in range(2):
            order = sheet.sort("delta/W")
            seen[order] = sheet.numbers("delta/W")
        assert seen == {"ascending": sorted(before), "descending": sorted(before, reverse=True)}

    def test_names_by_their_numbers_too(self, sheet: SheetOnPage) -> None:
        """Layer 2 stands before layer 10."""
        before = sheet.names
        natural = sorted(before, key=lambda text: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", text)])
        seen = {}
        for _ in range(2):
            order = sheet.sort("weight")
            seen[order] = sheet.names
        assert seen == {"ascending": natural, "descending": natural[::-1]}

    def test_rows_that_are_equal_keep_their_order(self, sheet: SheetOnPage) -> None:
        places = {name: place for place, name in enumerate(sheet.names)}
        sheet.sort("shape")
        after = list(zip(sheet.column("shape"), sheet.names, strict=True))
        equal = [(one, two) for (shape, one), (same, two) in pairwise(after) if shape == same]
        assert len(equal) > 100 and all(places[one] < places[two] for one, two in equal)

    def test_what_has_no_number_is_last_both_ways(self, made: Any, watch: Any) -> None:
        sheet = SheetOnPage(watch.open(made.page("diff")))
        column = next(title for title in sheet.titles if {None} < set(sheet.numbers(title)))
        missing = sheet.numbers(column).count(None)
        for _ in range(2):
            sheet.sort(column)
            assert sheet.numbers(column)[-missing:] == [None] * missing

    def test_one_column_at_a_time_says_that_it_is_sorted(self, sheet: SheetOnPage) -> None:
        told = [sheet.sort(title) for title in ("delta/W", "shape")]
        orders = [head.get_attribute("aria-sort") for head in sheet.section.locator("thead th").all()]
        assert [order for order in orders if order] == [told[-1]]

    def test_by_the_keyboard(self, sheet: SheetOnPage) -> None:
        before = sheet.numbers("delta/W")
        button = sheet.section.locator("th button", has_text="delta/W")
        for key, down in (("Enter", True), ("Space", False)):
            button.focus()
            sheet.page.keyboard.press(key)
            assert sheet.numbers("delta/W") == sorted(before, reverse=down)


class TestFiltering:
    def filter(self, sheet: SheetOnPage, pattern: str) -> str:
        """Type a pattern, and return what the page says of how many rows are left."""
        sheet.section.locator("input.filter").fill(pattern)
        return str(sheet.section.locator("output.count").inner_text())

    @pytest.mark.parametrize(
        "pattern", ["q_proj", "layers.3.", "*layers.1*q_proj*", "*.mlp.*", "k_proj, *v_proj.weight"]
    )
    def test_a_pattern_leaves_the_rows_that_it_matches(self, pattern: str, sheet: SheetOnPage) -> None:
        """A part of a name; with a * the whole name; several after commas."""
        names = sheet.names
        parts = [part.strip() for part in pattern.split(",")]
        left = [n for n in names if any(fnmatchcase(n, part) if "*" in part else part in n for part in parts)]
        assert self.filter(sheet, pattern) == f"{len(left)} of {len(names)}"
        assert sheet.names == left and left
        assert self.filter(sheet, "") == "" and sheet.names == names

    @pytest.mark.parametrize("pattern", ["(", "[", "\\", "+*?", "<script>", "no such module", "*", " , "])
    def test_a_pattern_of_signs_is_no_error(self, pattern: str, sheet: SheetOnPage) -> None:
        """`watch` holds that nothing is said on the console."""
        assert self.filter(sheet, pattern) == ("" if pattern in ("*", " , ") else "0 of 168")

    def test_what_is_filtered_out_comes_back_where_it_was_sorted(self, sheet: SheetOnPage) -> None:
        """And the grid has all of it."""
        cells = sheet.cells.count()
        sheet.sort("delta/W")
        order = sheet.names
        self.filter(sheet, "q_proj")
        assert sheet.cells.count() == cells and sheet.names == [name for name in order if "q_proj" in name]
        self.filter(sheet, "")
        assert sheet.names == order

    def test_what_needs_attention(self, sheet: SheetOnPage) -> None:
        flawed = [row["name"] for row in sheet.rows() if "\n" in row["cells"][0]["text"]]
        sheet.section.locator("input.flawed").check()
        assert sheet.names == flawed == ["model.layers.13.self_attn.q_proj.weight"]


class TestCopying:
    def copied(self, sheet: SheetOnPage) -> list[list[str]]:
        """Return the cells of each line that is copied, the titles first."""
        sheet.section.locator("button.copy").click()
        text = sheet.page.evaluate("navigator.clipboard.readText()")
        assert text.endswith("\n")
        return [line.split("\t") for line in text[:-1].split("\n")]

    def expected(self, sheet: SheetOnPage) -> list[list[str]]:
        """Return the same from the table: names, words, and the numbers behind what is written, in their units."""
        titles = [f"{t} ({u})" if u else t for t, u in zip(sheet.titles, sheet.units, strict=True)]
        rows = [
            [row["name"], *(cell["text"] if cell["value"] is None else cell["value"] for cell in row["cells"][1:])]
            for row in sheet.rows()
        ]
        return [titles, *rows]

    @pytest.fixture
    def sheet(self, made: Any, watch: Any) -> SheetOnPage:
        return SheetOnPage(watch.open(made.page("merge"), permissions=["clipboard-read", "clipboard-write"]))

    def test_the_rows_that_are_shown_as_they_are_ordered(self, sheet: SheetOnPage) -> None:
        every = self.copied(sheet)
        assert every == self.expected(sheet) and len(every) == 169
        sheet.sort("delta/W")
        sheet.section.locator("input.filter").fill("q_proj")
        some = self.copied(sheet)
        assert some == self.expected(sheet) and len(some) == 25
        assert sheet.section.locator("button.copy").inner_text() == "copied 24 rows"

    def test_where_the_clipboard_is_denied(self, sheet: SheetOnPage) -> None:
        """By a browser that knows no other way than the old one."""
        denied = "Promise.reject(new DOMException('', 'NotAllowedError'))"
        sheet.page.evaluate(f"() => {{ Clipboard.prototype.writeText = () => {denied}; }}")
        assert self.copied(sheet) == self.expected(sheet)
