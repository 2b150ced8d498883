"""Write the page that --html asks for: after the command's own output, and before its text or JSON.

So who reads the verdict has the page too. A page that cannot be made is a warning, as the command is done: its output
is whole, and its exit code says what it found.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import click
from click.core import ParameterSource

from ..errors import LoratoolError, shell_word, without_credentials
from ..files.hub.names import SCHEME, shareable
from ..views.parts.document import Line, line, path
from ..views.parts.numbers import nbytes
from ..views.parts.report import WritingReport
from ..views.parts.writing import command_line
from . import whole
from .messages import show_traceback
from .options import WeightedPath
from .usage import variables_of

if TYPE_CHECKING:
    from ..views.parts.report import Report
    from ..views.parts.writing import Written


def write_page(report: Report, place: str, status: str | None) -> tuple[Line, str | None]:
    """Write a report's page; return the line that says so, or a warning that it is not written, and why."""
    try:
        return _write_page(report, place, status), None
    except Exception as error:
        show_traceback()
        return (), f"the page {place} is not written: {_reason(error)}"


def _reason(error: Exception) -> str:
    if isinstance(error, LoratoolError):
        return "; ".join([*error.what, *([error.remedy] if error.remedy else [])])
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"internal error, please report it: {type(error).__name__}: {error}"


def _write_page(report: Report, place: str, status: str | None) -> Line:
    from ..ops.report_files import write_report

    if isinstance(report, WritingReport) and not (written := cast("Written", report)).dry_run:
        whole.append(written.out)
    try:
        size = write_report(report, place, command=typed_call(), status=status)
    finally:
        whole.clear()
    return line("page  ", path(place), f"  {nbytes(size)}")


def typed_call() -> str:
    """Return the call under way as a shell takes it: what was typed, behind what the environment says of its options.

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
    """Return a word of a call without the credentials of a link, whatever weights are behind it."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if SCHEME.match(value):
        with suppress(click.BadParameter):  # it is no input, but a text
            name = WeightedPath().convert(value, None, None)[0]
            value = shareable(name) + value[len(name) :]
    return without_credentials(option + equals + value)
