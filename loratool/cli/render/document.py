"""Print documents: the table on stdout, warnings and hints on stderr, and the verdict last.

A terminal gets lines of its width, in colour. A pipe gets all columns in lines of any length. Both say the same.
stdout is flushed before a warning is written and stderr before the verdict, so that a terminal shows them in order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import click
from click.core import ParameterSource

from ...errors import LoratoolError, shell_word, without_credentials
from ...files.hub.names import SCHEME, shareable
from ...views.parts.columns import lay_out
from ...views.parts.document import Line, TextSpan, line, path
from ...views.parts.numbers import nbytes
from ...views.parts.report import WritingReport
from ...views.parts.writing import command_line
from .. import written_without_page
from ..as_json import print_output
from ..messages import MAX_WARNINGS, print_hint, show_traceback, variables_of, warn, warning_line
from ..options import WeightedPath
from ..output_formats import writer_of
from ..surface import Surface, surface_of

if TYPE_CHECKING:
    from ...views.parts.document import Document
    from ...views.parts.report import Report
    from ...views.parts.writing import Written


def write_page(report: Report, place: str, status: str | None) -> tuple[Line, str | None]:
    """Write a report's page. Return the line on it, or a warning that it is not written, with the reason.

    This never raises: the command is done, and its report is still to be printed.
    """
    try:
        return _write_page(report, place, status), None
    except Exception as error:
        show_traceback()
        out = _written_by(report)
        what = f"{out} is written and whole, but its page {place}" if out else f"the page {place}"
        return (), f"{what} is not written: {_reason(error)}"


def _reason(error: Exception) -> str:
    if isinstance(error, LoratoolError):
        return "; ".join([*error.what, *([error.remedy] if error.remedy else [])])
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"internal error, please report it: {type(error).__name__}: {error}"


def _write_page(report: Report, place: str, status: str | None) -> Line:
    from ...commands.report_files import write_report

    written_without_page.extend(filter(None, [_written_by(report)]))
    try:
        size = write_report(report, place, command=typed_call(), status=status)
    finally:
        written_without_page.clear()
    return line("page  ", path(place), f"  {nbytes(size)}")


def _written_by(report: Report) -> str | None:
    """Return the output that a command has written. None in a dry run, or if the command writes none."""
    if isinstance(report, WritingReport) and not (written := cast("Written", report)).dry_run:
        return written.out
    return None


def typed_call() -> str:
    """Return the current call for a shell: environment variables that set its options, then the words typed.

    Links are without credentials.
    """
    context = click.get_current_context()
    settings = []
    for option in context.command.params:
        if option.name and context.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT:
            name = next(each for each in variables_of(context.command.name or "", option) if os.environ.get(each))
            settings.append(f"{name}={shell_word(_shareable(os.environ[name]))} ")
    return "".join(settings) + command_line(*map(_shareable, context.find_root().obj))


def _shareable(word: str) -> str:
    """Return a word of a call without the credentials of a link, with or without weights."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if SCHEME.match(value):
        with suppress(click.BadParameter):  # it is no input, but a text
            name = WeightedPath().convert(value, None, None)[0]
            value = shareable(name) + value[len(name) :]
    return without_credentials(option + equals + value)


BUDGET = 25  # lines of a report without --verbose


def print_report(
    command: str,
    report: Report,
    *,
    form: str = "text",
    quiet: bool = False,
    verbose: bool = False,
    html: str | None = None,
    status: str | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Print a report as a document, or in a format of other programs. Warnings go to stderr, whatever the format.

    Args:
        form: a key of FORMATS. The log of a job has github's lines below the document.
        html: the path of its page, which is written first.
        status: the word for a failed check.
        extra: keys and values to print besides; JSON has them in the report.
    """
    page, unwritten = ((), None) if html is None else write_page(report, html, status)
    failed = (unwritten,) if unwritten else ()
    written = "" if form == "text" else writer_of(form)(command, report, status=status)
    if form not in ("text", "github"):
        print_output(written)
        warn((*failed, *getattr(report, "warnings", ())))
        return
    document = report.document(verbose)
    context = click.get_current_context(silent=True)
    asked = not verbose and context and context.params.get("digest")
    besides = [line(f"{key}: {value}") for key, value in sorted((extra or {}).items())]
    lists = (*((page,) if page else ()), *document.lists, *(report.digest_lines() if asked else ()), *besides)
    document = replace(document, lists=lists, warnings=(*failed, *document.warnings))
    print_document(document, surface_of(sys.stdout), surface_of(sys.stderr), quiet)
    print_output(written)


def print_document(document: Document, out: Surface, err: Surface, quiet: bool = False) -> None:
    """Print a document. With `quiet` print only verdict, warnings and hint."""
    verdict, has_room = _wrapped(document.verdict, out), False
    if quiet:
        warnings = [err.wrap(warning_line(text)) for text in document.warnings]
        err.print(_fitted(warnings, None if document.verbose or err.width is None else MAX_WARNINGS, _more_warnings))
        out.print(verdict or out.wrap(document.subject))
    else:
        body, warnings_shown, has_room = _fit(document, out, err, len(verdict))
        out.print(body)
        err.print(warnings_shown)
        out.print(verdict)
    if document.hint:
        print_hint(err, document.hint)
    elif document.next and has_room and out.width is not None and err.width is not None:
        err.print([line(TextSpan("next: ", "faint"), document.next)])


def _fit(document: Document, out: Surface, err: Surface, verdict: int) -> tuple[list[Line], list[Line], bool]:
    """Return the lines before the warnings, the warnings, and whether there is room for more.

    All rows are shown. The rest of BUDGET is for warnings, then for lists, then for issues of the table.
    """
    head = _wrapped((document.subject, *document.facts), out)
    rows = [lay_out(table, out.width, out.plain, 0) for table in document.tables]
    drawn = bool(document.tables or document.pictures)
    room = BUDGET - len(head) - sum(len(each) + 1 for each in rows) - verdict - drawn - bool(document.hint)
    limited = not document.verbose and out.width is not None
    lists = [out.wrap(spans) for spans in document.lists]
    warnings = [err.wrap(warning_line(text)) for text in document.warnings]
    shown_warnings = _fitted(
        warnings, min(room - min(len(lists), 2), MAX_WARNINGS) if limited else None, _more_warnings
    )
    listed = _fitted(lists, room - len(shown_warnings) if limited else None, _more_lines)
    room -= len(shown_warnings) + len(listed)
    lines = head
    for table, least in zip(document.tables, rows, strict=True):
        spare = None if document.verbose else len(least) + max(0, room)
        laid = lay_out(table, out.width, out.plain, spare) if any(row.issues for row in table.rows) else least
        lines = [*lines, *([()] if lines else []), *laid]
    lines += [(), *document.pictures] if document.pictures else []
    return [*lines, *listed, *([()] if drawn and verdict else [])], shown_warnings, room > 0


def _wrapped(lines: Iterable[Line], out: Surface) -> list[Line]:
    return [each for spans in lines if spans for each in out.wrap(spans)]


def _fitted(parts: Sequence[list[Line]], room: int | None, more: Callable[[int], Line]) -> list[Line]:
    """Return the parts that fit, and a line that counts the others. The first part is always included."""
    if room is None or sum(map(len, parts)) <= room:
        return [each for part in parts for each in part]
    shown, count = list[Line](), 0
    while count < len(parts) and (not shown or len(shown) + len(parts[count]) < room):
        shown += parts[count]
        count += 1
    return [*shown, more(len(parts) - count)] if count < len(parts) else shown


def _more_warnings(count: int) -> Line:
    return warning_line(f"and {count:,} more: --json has them")


def _more_lines(count: int) -> Line:
    return line(f"and {count:,} more: -v shows them")
