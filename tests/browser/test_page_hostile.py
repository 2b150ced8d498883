"""What comes from a file stays text on a page: nothing of it runs, loads, or breaks what stands around it."""

from __future__ import annotations

from typing import Any

import pytest
from lib.browser.hostile_files import HOSTILE_PAGES, NAMES, ONE
from lib.browser.sheets import SheetOnPage

pytestmark = pytest.mark.browser

TOO_WIDE = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
# elements that a page of ours has none of, or that names and metadata could bring in
FOREIGN = """img, iframe, object, embed, base, form, a[href^='javascript:'], meta[http-equiv=refresh], [onerror],
    [onload], [onmouseover]"""


def use_all(sheet: SheetOnPage) -> None:
    """Do what a reader does: each control once, and a pointer over each cell of the grid."""
    for title in sheet.colours:
        sheet.colour = title
    for cell in sheet.cells.all():
        cell.hover()
        cell.click()
    for title in sheet.titles:
        sheet.sort(title)
    for pattern in ("<script>window.pwned=1</script>", "constructor", ""):
        sheet.section.locator("input.filter").fill(pattern)
    sheet.section.locator("button.copy").click()


@pytest.mark.parametrize("name", HOSTILE_PAGES)
def test_nothing_of_a_file_runs(name: str, made: Any, watch: Any) -> None:
    """`watch` holds that there was no dialog, no request, and nothing against the page's policy."""
    path = made.hostile(name)
    page = watch.open(path, width=360, permissions=["clipboard-read", "clipboard-write"])
    page.locator("h1").wait_for()
    assert page.evaluate("window.shift") < 0.02
    for title in page.locator("section.sheet").evaluate_all("all => all.map(each => each.dataset.title)"):
        use_all(SheetOnPage(page, title))
    assert page.evaluate("window.pwned") is None and page.locator(FOREIGN).count() == 0
    assert page.evaluate("location.href") == path.as_uri() and page.evaluate(TOO_WIDE) <= 0


@pytest.mark.parametrize("name", HOSTILE_PAGES)
def test_its_own_scripts_are_the_only_ones(name: str, made: Any, watch: Any) -> None:
    """As its bytes are read, before any script runs, there are as many as on the page of a harmless file."""
    page = watch.open(made.hostile(name), java_script_enabled=False)
    harmless = watch.open(made.page("merge"), java_script_enabled=False)
    for part in ("script:not([type])", "style", "meta", "html > *", "body > *"):
        assert page.locator(part).count() == harmless.locator(part).count(), part


def test_names_are_read_as_they_are(made: Any, watch: Any) -> None:
    """What can be printed stands there; the rest as a terminal has it, or it would hide or turn what is beside it."""
    page = watch.open(made.hostile("merge"))
    sheet = SheetOnPage(page)
    text = page.locator("body").inner_text()
    for name in NAMES:
        if name.isprintable():
            assert name in text
    assert "49" not in sheet.names[9]
    for sign in "\u202e\u2066\u2028\x00\x1b\x7f\x85\u200b":
        assert sign not in text
    assert ONE in page.locator("body").inner_text()


def test_a_line_of_the_copied_table_is_a_row(made: Any, watch: Any) -> None:
    """Tabs and ends of lines in names are none there."""
    page = watch.open(made.hostile("merge"), permissions=["clipboard-read", "clipboard-write"])
    sheet = SheetOnPage(page)
    sheet.section.locator("button.copy").click()
    lines = page.evaluate("navigator.clipboard.readText()").split("\n")
    lines = [line for line in lines if line]
    assert len(lines) == len(NAMES) + 1 and {line.count("\t") for line in lines} == {len(sheet.titles) - 1}


def test_the_report_comes_back_with_its_names(made: Any) -> None:
    import loratool

    report = loratool.read_report(made.hostile("merge"))
    assert {row.name for row in report.tensors} == {f"model.layers.{i}.{name}.weight" for i, name in enumerate(NAMES)}
