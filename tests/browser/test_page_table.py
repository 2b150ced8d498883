"""The table of a page: sorted by any column, filtered by a pattern, and copied as it is shown."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from sheets import SheetOnPage

pytestmark = pytest.mark.browser


@pytest.fixture
def sheet(made: Any, watch: Any) -> SheetOnPage:
    return SheetOnPage(watch.open(made.page("merge")))


class TestSorting:
    def order(self, sheet: SheetOnPage, title: str) -> str | None:
        """Press the title of a column, and return what it then says of its order."""
        sheet.section.locator("th button", has_text=re.compile(f"^{re.escape(title)}$")).click()
        head = sheet.section.locator("thead th").nth(sheet.titles.index(title))
        return head.get_attribute("aria-sort")

    def test_numbers_in_both_directions(self, sheet: SheetOnPage) -> None:
        before = sheet.numbers("delta")
        assert len(set(before)) > 100 and None not in before
        seen = {}
        for _ in range(2):
            order = self.order(sheet, "delta")
            seen[order] = sheet.numbers("delta")
        assert seen == {"ascending": sorted(before), "descending": sorted(before, reverse=True)}

    def test_names_by_their_numbers_too(self, sheet: SheetOnPage) -> None:
        """Layer 2 stands before layer 10."""
        name = sheet.titles[0]
        before = sheet.column(name)
        natural = sorted(before, key=lambda text: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", text)])
        seen = {}
        for _ in range(2):
            order = self.order(sheet, name)
            seen[order] = sheet.column(name)
        assert seen == {"ascending": natural, "descending": natural[::-1]}

    def test_rows_that_are_equal_keep_their_order(self, sheet: SheetOnPage) -> None:
        before = sheet.column(sheet.titles[0])
        shape = sheet.column("shape")
        assert len(set(shape)) < 10
        self.order(sheet, "shape")
        after = list(zip(sheet.column("shape"), sheet.column(sheet.titles[0]), strict=True))
        places = {name: place for place, name in enumerate(before)}
        for one, two in pairwise(after):
            assert one[0] != two[0] or places[one[1]] < places[two[1]]

    def test_one_column_at_a_time_says_that_it_is_sorted(self, sheet: SheetOnPage) -> None:
        for title in ("delta", "shape"):
            self.order(sheet, title)
        orders = [head.get_attribute("aria-sort") for head in sheet.section.locator("thead th").all()]
        assert [order for order in orders if order not in (None, "none")] == ["ascending"] or orders.count(
            "descending"
        ) == 1

    def test_by_the_keyboard(self, sheet: SheetOnPage) -> None:
        before = sheet.numbers("delta")
        button = sheet.section.locator("th button", has_text=re.compile("^delta$"))
        for key in ("Enter", "Space"):
            button.focus()
            sheet.page.keyboard.press(key)
            assert sheet.numbers("delta") in (sorted(before), sorted(before, reverse=True))


class TestFiltering:
    def filter(self, sheet: SheetOnPage, pattern: str) -> str:
        """Type a pattern, and return what the page says of how many rows are left."""
        sheet.section.locator("input.filter").fill(pattern)
        sheet.page.wait_for_timeout(300)  # it may wait for the reader to end
        return str(sheet.section.locator("output.count").inner_text())

    @pytest.mark.parametrize("pattern", ["q_proj", "layers.3.", "Q_PROJ", "layers.1*q_proj", "no such module"])
    def test_a_pattern_leaves_the_rows_that_it_matches(self, pattern: str, sheet: SheetOnPage) -> None:
        names = sheet.column(sheet.titles[0])
        count = self.filter(sheet, pattern)
        expression = ".*".join(map(re.escape, pattern.split("*")))
        left = [name for name in names if re.search(expression, name, re.IGNORECASE)]
        assert sheet.column(sheet.titles[0]) == left
        assert str(len(left)) in count and str(len(names)) in count
        self.filter(sheet, "")
        assert sheet.column(sheet.titles[0]) == names

    @pytest.mark.parametrize("pattern", ["(", "[", "\\", "+*?", "<script>"])
    def test_a_pattern_of_signs_is_no_error(self, pattern: str, sheet: SheetOnPage) -> None:
        """`watch` holds that nothing is said on the console."""
        assert "0" in self.filter(sheet, pattern)

    def test_what_is_filtered_out_leaves_the_grid_as_it_is_and_comes_back_sorted(self, sheet: SheetOnPage) -> None:
        cells = sheet.cells.count()
        sheet.section.locator("th button", has_text=re.compile("^delta$")).click()
        order = sheet.column(sheet.titles[0])
        self.filter(sheet, "q_proj")
        assert sheet.cells.count() == cells and sheet.column(sheet.titles[0]) == [n for n in order if "q_proj" in n]
        self.filter(sheet, "")
        assert sheet.column(sheet.titles[0]) == order


class TestCopying:
    def copied(self, sheet: SheetOnPage) -> str:
        sheet.section.locator("button.copy").click()
        return str(sheet.page.evaluate("navigator.clipboard.readText()"))

    def lines(self, sheet: SheetOnPage) -> list[list[str]]:
        return [sheet.titles, *([cell["text"] for cell in row["cells"]] for row in sheet.rows())]

    def test_the_rows_that_are_shown_as_they_are_ordered(self, made: Any, watch: Any) -> None:
        page = watch.open(made.page("merge"), permissions=["clipboard-read", "clipboard-write"])
        sheet = SheetOnPage(page)
        every = [line.split("\t") for line in self.copied(sheet).splitlines()]
        assert len(every) == len(sheet.rows()) + 1 and every[0] == sheet.titles
        assert [line[0] for line in every[1:]] == sheet.column(sheet.titles[0])
        sheet.section.locator("th button", has_text=re.compile("^delta$")).click()
        sheet.section.locator("input.filter").fill("q_proj")
        page.wait_for_timeout(300)
        some = [line.split("\t") for line in self.copied(sheet).splitlines()]
        assert [line[0] for line in some[1:]] == sheet.column(sheet.titles[0]) and len(some) < len(every)

    def test_where_the_clipboard_is_denied(self, made: Any, watch: Any) -> None:
        """By a browser that knows no other way than the old one."""
        page = watch.open(made.page("merge"), permissions=["clipboard-read", "clipboard-write"])
        page.evaluate("navigator.clipboard.writeText('before')")
        page.evaluate("Clipboard.prototype.writeText = () => Promise.reject(new DOMException('', 'NotAllowedError'))")
        sheet = SheetOnPage(page)
        text = self.copied(sheet)
        assert text.splitlines()[0].split("\t") == sheet.titles
        assert len(text.splitlines()) == len(sheet.rows()) + 1
