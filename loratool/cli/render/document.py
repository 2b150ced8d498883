"""Print documents: the table on stdout, warnings and hints on stderr, and the verdict last.

A terminal gets lines of its width, in colour; a pipe gets all columns in lines of any length. Both say the same.
stdout is flushed before a warning is written and stderr before the verdict, so that a terminal shows them in order.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...reports.columns import lay_out
from ...reports.document import Line, Toned, line
from ..messages import MAX_WARNINGS, print_hint, print_warnings
from ..surface import Surface, surface_of
from .as_json import to_json

if TYPE_CHECKING:
    from ...reports.document import Document
    from ...reports.report import Report

BUDGET = 25  # lines of a report without --verbose


def print_report(
    command: str,
    report: Report,
    *,
    json: bool,
    quiet: bool = False,
    verbose: bool = False,
    status: str | None = None,
    told: Mapping[str, str] | None = None,
) -> None:
    """Print a report as its document or as the one JSON object; warnings go to stderr with --json too.

    Args:
        status: what a check found that said no.
        told: keys and values that are printed besides; JSON has them in the report.
    """
    if json:
        print(to_json(command, report, status=status))
        sys.stdout.flush()
        print_warnings(surface_of(sys.stderr), getattr(report, "warnings", ()), None)
        return
    document = report.document(verbose)
    if told:
        document = replace(document, lists=(*document.lists, *(line(f"{key}: {told[key]}") for key in sorted(told))))
    print_document(document, surface_of(sys.stdout), surface_of(sys.stderr), quiet)


def print_document(document: Document, out: Surface, err: Surface, quiet: bool = False) -> None:
    """Print a document; with `quiet` only verdict, warnings and hint."""
    verdict = [each for spans in document.verdict for each in out.wrap(spans)]
    if quiet and not verdict:
        verdict = out.wrap(document.subject)
    limit = None if document.verbose or err.width is None else MAX_WARNINGS
    if not quiet:
        out.print(_body(document, out, len(verdict) + _lines_on_stderr(document, err)))
    print_warnings(err, document.warnings, limit)
    out.print(verdict)
    if document.hint:
        print_hint(err, document.hint)
    elif document.next and not quiet and out.width is not None and err.width is not None:
        err.print([line(Toned("next: ", "faint"), document.next)])


def _lines_on_stderr(document: Document, err: Surface) -> int:
    warnings = [line("warning: ", text) for text in document.warnings[:MAX_WARNINGS]]
    return sum(len(err.wrap(spans)) for spans in warnings) + bool(document.hint or document.next)


def _body(document: Document, out: Surface, reserved: int) -> list[Line]:
    """Return all of a document but warnings and verdict.

    Remarks of the table give way to what else there is.

    Args:
        reserved: lines that are not in the body.
    """
    head = [each for spans in (document.subject, *document.facts) if spans for each in out.wrap(spans)]
    lists = [each for spans in document.lists for each in out.wrap(spans)]
    used = len(head) + len(lists) + reserved + 2  # blank lines
    lines = head
    for table in document.tables:
        room = None if document.verbose else BUDGET - used
        lines = [*lines, *([()] if lines else []), *lay_out(table, out.width, out.plain, room)]
    lines += [(), *document.pictures] if document.pictures else []
    return [*lines, *lists, *([()] if document.tables or document.pictures else [])]
