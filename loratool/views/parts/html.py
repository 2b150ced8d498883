"""Write a document as a fragment of HTML, for notebooks: the same table, with strips in their colours."""

from __future__ import annotations

from html import escape as quote

from .columns import shade
from .document import HEATS, Document, Line, NamedIssue, Strip, TextTable, escape, heat

# style -> its CSS; the colours are as far from white as from a dark page
STYLES = {
    "path": "font-weight:bold",
    "good": "color:#2e9e5b",
    "bad": "color:#d64545",
    "attention": "color:#b58900",
    "faint": "opacity:0.7",
    **dict(
        zip(
            (f"heat{i}" for i in range(HEATS)),
            (f"color:#{c}" for c in "4a6fd0 2f7fb8 1f8a8a 2e8f57 6b8a1f a07a12 c0661c d04a3a".split()),
            strict=True,
        )
    ),
}


def to_html(document: Document) -> str:
    """Return a fragment with every part of a document."""
    parts = [_lines([document.subject, *document.facts])]
    parts += [_table(table) for table in document.tables]
    parts += [_lines(document.pictures, "pre")]
    parts += [_lines(document.lists)]
    parts += [f"<div><span style='{STYLES['attention']}'>warning:</span> {_text(w)}</div>" for w in document.warnings]
    parts += [_lines(document.verdict)]
    parts += [f"<div>hint: {_text(document.hint)}</div>"] if document.hint else []
    return f"<div class='loratool'>{''.join(parts)}</div>"


def _text(text: str) -> str:
    return quote(escape(text))


def _lines(lines: tuple[Line, ...] | list[Line], tag: str = "div") -> str:
    return "".join(f"<{tag}>{_line(spans)}</{tag}>" for spans in lines if spans)


def _line(spans: Line) -> str:
    return "".join(_span(span.text, span.style) for span in spans)


def _span(text: str, style: str) -> str:
    return f"<span style='{STYLES[style]}'>{_text(text)}</span>" if style else _text(text)


def _table(table: TextTable) -> str:
    sides = ["right" if column.right else "left" for column in table.columns]
    head = "".join(
        f"<th style='text-align:{s}'>{_text(c.title)}</th>" for c, s in zip(table.columns, sides, strict=True)
    )
    rows = []
    for row in table.rows:
        cells = "".join(f"<td style='text-align:{s}'>{_cell(c)}</td>" for c, s in zip(row.cells, sides, strict=True))
        rows.append(f"<tr>{cells}</tr>")
        rows += [f"<tr><td colspan='{len(sides)}'>{_issue_line(issue)}</td></tr>" for issue in row.issues]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _cell(cell: str | Strip) -> str:
    if isinstance(cell, str):
        return _text(cell)
    return "".join(_span(shade(value), heat(value)) for value in cell.heats)


def _issue_line(issue: NamedIssue) -> str:
    return f"{_span('!', 'attention')} {_text(issue.name)} &nbsp; {_span(issue.reason, 'attention')}"
