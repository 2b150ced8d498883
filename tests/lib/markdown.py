"""Write tables and lists of the guides as Markdown, and put them between the marks of a guide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

WIDEST = 110  # characters of a row that is padded, so that its columns are aligned
END = "<!-- until here -->\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, with aligned columns unless its rows would be too wide."""
    cells = [[*heads], *([*row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if sum(widths) + 3 * len(widths) + 1 > WIDEST:
        widths = [0] * len(widths)
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * max(width + 2, 3) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def bullet(text: str) -> str:
    """Return an item of a list, wrapped as prose is in the guides."""
    return textwrap.fill(
        text, WIDEST, initial_indent="- ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ) + "\n"  # fmt: skip


def between(text: str, mark: str) -> str:
    """Return the part of a guide below a mark."""
    _, found, rest = text.partition(mark)
    inner, end, _ = rest.partition(END)
    assert found and end, f"there is no {mark.strip()} with an end"
    return inner


def replaced(text: str, mark: str, inner: str) -> str:
    """Return a guide with another part below a mark."""
    return text.replace(mark + between(text, mark) + END, mark + inner + END)


def put(guide: Path, mark: str, inner: str) -> None:
    """Write a part of a guide below its mark."""
    guide.write_text(replaced(guide.read_text(), mark, inner))
