"""Render a report as a page: one HTML file that needs no network, runs no other script, and holds the report as JSON.

All text passes `document.escape`, which makes control characters and marks of direction visible, and Jinja2's escaping.
Data for scripts is JSON without any character of HTML. Only scripts with listed hashes are allowed.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...architectures.numbered_names import split_numbers
from ..parts.content import Axis, Curve, Heatmap, Sheet
from ..parts.document import Document, Strip, TextTable, escape, text_of
from ..parts.envelope import BEGIN, REPORT_TAG
from ..parts.numbers import plural
from ..parts.report import Report
from ..parts.rows import WORST, Category, Item, Measure, group_items, make_items
from ..parts.table import is_shown
from .grid import Grid, make_grids


@dataclass(frozen=True)
class Vendored:
    """A file of an npm package.

    Attributes:
        file: its name in `vendor/`; the licence's is beside it.
        source: its path in the package.
    """

    package: str
    version: str
    source: str
    file: str
    licence_file: str
    licence: str
    sha256: str


# in the order in which they are loaded
VENDORED = (
    Vendored(
        "d3",
        "7.9.2",
        "dist/d3.min.js",
        "d3.min.js",
        "d3.LICENSE",
        "ISC",
        "912111098ea99503a6f4967361d2bbdc9dbf58cf9c678c8e27e5b02d1a07f0c1",
    ),
    Vendored(
        "@observablehq/plot",
        "0.6.17",
        "dist/plot.umd.min.js",
        "plot.umd.min.js",
        "plot.LICENSE",
        "ISC",
        "4358086467740777dd788d6b27a95cebdbaefdd50c730a3060117073bd7134cb",
    ),
)

HERE = Path(__file__).parent

SCRIPTS = ("table", "colours", "grid", "curve", "start")  # in the order in which they are loaded

AT_ONCE = 'document.documentElement.className = "js";'  # before the first paint: what needs scripts has its room

FOLDED = 8  # lines of one list, above which it is folded

DIGITS = 7  # significant, of the numbers behind what is written

WHOLE = 1e15  # from there on a float's digits are not all known

COLOURS = 8  # that words can have, so that they are told apart

TALL, LOW, MANY_ROWS = 20, 8, 40  # pixels of a grid's row, and how many may be tall


def render(report: Report, envelope: Mapping[str, Any], command: str | None) -> str:
    """Return the page of a report.

    Args:
        envelope: what `--json` prints.
        command: the command line of the report, if any.
    """
    document, page = report.document(verbose=True), report.page()
    sheets = [_sheet(each) for each in page.sheets if each.rows]
    scripts = [_text(f"vendor/{each.file}") for each in VENDORED] + [_text(f"scripts/{name}.js") for name in SCRIPTS]
    template = _environment().get_template("page.html")
    return template.render(
        begin=Markup(BEGIN),
        policy=_policy([AT_ONCE, *scripts]),
        at_once=Markup(AT_ONCE),
        style=Markup(_text("page.css")),
        scripts=[Markup(each) for each in scripts],
        vendored=VENDORED,
        report_tag=Markup(REPORT_TAG),
        envelope=_json(envelope),
        verb=envelope["verb"],
        document=document,
        text_of=text_of,
        verdict_tone=_verdict_style(document),
        lists=_lists(document),
        folded=FOLDED,
        page=page,
        sheets=sheets,
        tables=() if sheets else [_plain_table(each) for each in document.tables],
        heatmaps=[_heatmap(each) for each in page.heatmaps],
        command=command,
        version=version("loratool"),
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else escape(str(value)),
    )


@cache
def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return the Content-Security-Policy: no network, no script but these.

    Plot writes a style beside its drawing, and draws the colours of a scale as an image.
    """
    hashes = " ".join(f"'sha256-{b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _json(value: Any) -> Markup:
    """Return JSON without characters that HTML parsers take for markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _verdict_style(document: Document) -> str:
    """Return the style of a verdict: that of its first line."""
    return next((span.style for spans in document.verdict[:1] for span in spans if span.style in VERDICT_STYLES), "")


VERDICT_STYLES = ("good", "bad", "attention")


def _lists(document: Document) -> list[tuple[str, list[str]]]:
    """Return the lines of a document's lists by the label before the colon: `note`, `left out`."""
    lines_of: dict[str, list[str]] = {}
    for spans in document.lists:
        label, colon, rest = text_of(spans).partition(": ")
        lines_of.setdefault(label if colon else "", []).append(rest if colon else label)
    return list(lines_of.items())


def _sheet(sheet: Sheet[Any]) -> dict[str, Any]:
    """Return the values of a sheet for template and scripts. Rows are sorted by name: layer 2 before layer 10."""
    rows = sorted(sheet.rows, key=lambda row: _by_numbers(row.name))
    columns = [column for column in sheet.columns if is_shown(column, rows)]
    items = make_items(rows, [row.name for row in rows], columns, sheet.find_issue)
    issues = _reasons(items)
    members = [sheet.members(row) for row in rows] if sheet.members else None
    grids = make_grids(items, members)
    colours = [i for i, each in enumerate(columns) if isinstance(each, Measure) or _is_few(each, items)]
    drawn = {"grids": [_grid(each) for each in grids], "curves": [_curve(each, rows) for each in sheet.curves]}
    return {
        "title": sheet.title,
        "count": plural(len(items), sheet.title),
        "columns": [(each.what, isinstance(each, Measure)) for each in columns],
        "rows": [(item, issues.get(i), [_cell(column, item) for column in columns]) for i, item in enumerate(items)],
        "issues": len(issues),
        "curves": len(sheet.curves),
        "colours": colours if len(items) > 1 else [],
        "first": _shown_first(columns, colours),
        "parts": [grid.label or (f"{grid.x}s" if grid.x else "others") for grid in grids],
        "drawn": _json(_shown(drawn)),
        "height": _row_height(grids[0]) * len(grids[0].rows) if grids else 0,
    }


def _by_numbers(name: str) -> list[str | int]:
    """Return the texts and numbers of a name in turn, as a key to sort by."""
    return [each for both in zip_longest(*split_numbers(name, underscores=True), fillvalue=0) for each in both]


def _reasons(items: Sequence[Item[Any]]) -> dict[int, str]:
    """Return the reasons of items with issues: the worst, and those that the table of groups shows or has as a row."""
    groups = group_items(items)
    shown = {id(item) for group in groups for item in group.with_issues}
    shown |= {id(group.members[0]) for group in groups if len(group.members) == 1}
    items_with_issues = ((i, item, item.issue) for i, item in enumerate(items) if item.issue)
    return {i: issue.reason for i, item, issue in items_with_issues if issue.severity == WORST or id(item) in shown}


def _shown_first(columns: Sequence[Category[Any] | Measure[Any]], colours: Sequence[int]) -> int | None:
    """Return the column that a grid shows first: the drawn one, else a number, else any."""
    measures = [(i, column) for i in colours if isinstance(column := columns[i], Measure)]
    drawn = [i for i, column in measures if column.drawn]
    return next(iter([*drawn, *(i for i, _ in measures), *colours]), None)


def _is_few(column: Category[Any], items: Sequence[Item[Any]]) -> bool:
    return len({item.values[column.what.title] for item in items}) <= COLOURS


def _row_height(grid: Grid) -> int:
    return TALL if len(grid.rows) <= MANY_ROWS else LOW


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "x": grid.x,
        "y": grid.y,
        "columns": grid.columns,
        "rows": grid.rows,
        "cells": grid.cells,
        "height": _row_height(grid),
    }


def _shown(value: Any) -> Any:
    """Return data with the texts escaped as elsewhere."""
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {escape(key): _shown(each) for key, each in value.items()}
    return [_shown(each) for each in value] if isinstance(value, list | tuple) else value


def _cell(column: Category[Any] | Measure[Any], item: Item[Any]) -> tuple[str, str | None]:
    """Return the text of a cell, and its number in the unit of the column. The number is None for words."""
    if isinstance(column, Category):
        return item.values[column.what.title], None
    value = column.of(item.row)
    return ("-", "") if value is None else (column.write(value), _number(value * column.what.scale))


def _number(value: float) -> str:
    """Return a number as text. A whole number has all its digits."""
    return str(int(value)) if float(value).is_integer() and abs(value) < WHOLE else f"{value:.{DIGITS}g}"


def _curve(curve: Curve[Any], rows: Sequence[Any]) -> dict[str, Any]:
    lines = {i: curve.lines(row) for i, row in enumerate(rows)}
    return {
        "title": curve.title,
        "x": _axis(curve.x),
        "y": _axis(curve.y),
        "rows": {
            str(i): {
                name: [[float(_number(value)) for value in point] for point in points] for name, points in each.items()
            }
            for i, each in lines.items()
            if each
        },
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {"title": axis.what.title, "unit": axis.what.unit, "log": axis.log, "ends": axis.ends}


def _heatmap(heatmap: Heatmap) -> dict[str, Any]:
    rows = [
        (name, [("-", "") if v is None else (heatmap.write(v), _number(v * heatmap.cell.scale)) for v in values])
        for name, values in zip(heatmap.rows, heatmap.values, strict=True)
    ]
    return {"heatmap": heatmap, "rows": rows}


def _plain_table(table: TextTable) -> dict[str, Any]:
    """Return a table of texts, without the columns of strips."""
    plain = [i for i, column in enumerate(table.columns) if not column.strips]
    rows = [[cell for i in plain if not isinstance(cell := row.cells[i], Strip)] for row in table.rows]
    return {"columns": [table.columns[i] for i in plain], "rows": rows}
