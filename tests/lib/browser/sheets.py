"""Read a sheet of a page as its reader does: the rows of its table, what is shown of them, and what its grid says."""

from __future__ import annotations

from typing import Any

READ = """section => {
  const cells = row => [...row.cells].map(cell => ({text: cell.innerText.trim(), value: cell.dataset.v ?? null}));
  return {
    titles: [...section.querySelectorAll("thead th")].map(th => th.innerText.trim()),
    units: [...section.querySelectorAll("thead th")].map(th => th.dataset.unit ?? ""),
    rows: [...section.querySelectorAll("tbody tr[data-row]")].map(row => (
      {row: row.dataset.row, name: row.querySelector("th bdi").textContent, cells: cells(row),
       shown: row.checkVisibility()})),
  };
}"""


class SheetOnPage:
    """The first sheet of a page, or the one that is named.

    Attributes:
        titles, units: of the columns; most have no unit.
    """

    def __init__(self, page: Any, title: str | None = None) -> None:
        self.page = page
        named = "section.sheet" if title is None else f'section.sheet[data-title="{title}"]'
        self.section = page.locator(named).first
        read = self.section.evaluate(READ)
        self.titles: list[str] = read["titles"]
        self.units: list[str] = read["units"]

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that are shown, in their order: `row`, `name`, and `cells` with `text` and `value`."""
        return [row for row in self.section.evaluate(READ)["rows"] if row["shown"]]

    @property
    def names(self) -> list[str]:
        """Return the names of the rows that are shown."""
        return [row["name"] for row in self.rows()]

    def column(self, title: str) -> list[str]:
        """Return the texts of a column, of the rows that are shown."""
        place = self.titles.index(title)
        return [row["cells"][place]["text"] for row in self.rows()]

    def numbers(self, title: str) -> list[float | None]:
        """Return the numbers behind a column's texts, None where there is none."""
        place = self.titles.index(title)
        values = [row["cells"][place]["value"] for row in self.rows()]
        return [None if value in (None, "") else float(value) for value in values]

    def find(self, row: str, title: str) -> tuple[str, str]:
        """Return the name of a row, by what the grid calls it, and its text in a column."""
        (found,) = [each for each in self.section.evaluate(READ)["rows"] if each["row"] == row]
        return found["name"], found["cells"][self.titles.index(title)]["text"]

    def sort(self, title: str) -> str | None:
        """Press the title of a column, and return what it then says of its order."""
        head = self.section.locator("thead th").nth(self.titles.index(title))
        head.locator("button").click()
        return head.get_attribute("aria-sort")  # type: ignore[no-any-return]

    @property
    def cells(self) -> Any:
        """Return the cells of the grid that stand for a row."""
        return self.section.locator(".grid [data-row]")

    @property
    def reading(self) -> str:
        """Return what the page says of the cell that is pointed at."""
        return str(self.section.locator("output.reading").inner_text())

    @property
    def colour(self) -> str:
        """Return the title that the grid is coloured by."""
        return str(self.section.locator(".colour option:checked").inner_text()).strip()

    @colour.setter
    def colour(self, title: str) -> None:
        self.section.locator("select.colour").select_option(label=title)

    @property
    def colours(self) -> list[str]:
        """Return the titles that the grid can be coloured by."""
        return list(map(str.strip, self.section.locator(".colour option").all_inner_texts()))
