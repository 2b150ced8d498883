"""Write the page that --html asks for: after the command's own output, and before its text or JSON.

So who reads the verdict has the page too, and an error that keeps it from being written says that the output is whole.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import click
from click.core import ParameterSource

from ..errors import LoratoolError, shell_word
from ..files.hub_names import SCHEME, without_query
from ..reports.document import Line, line, path
from ..reports.numbers import nbytes
from ..reports.report import WritingReport
from ..reports.writing import command_line
from . import whole
from .options import WeightedPath

if TYPE_CHECKING:
    from ..reports.report import Report
    from ..reports.writing import Written


def write_page(report: Report, place: str, status: str | None) -> Line:
    """Write a report's page and return the line that says so."""
    from ..ops.report_files import write_report

    if isinstance(report, WritingReport) and not (written := cast("Written", report)).dry_run:
        whole.append(written.out)
    size = write_report(report, place, command=typed_call(), status=status)
    whole.clear()
    return line("page  ", path(place), f"  {nbytes(size)}")


def typed_call() -> str:
    """Return the call under way as a shell takes it: what was typed, behind what the environment says of its options.

    Of links of the hub what stands behind a ? is left out, as it may be a token.
    """
    context = click.get_current_context()
    settings = []
    for option in context.command.params:
        if option.name and context.get_parameter_source(option.name) is ParameterSource.ENVIRONMENT:
            name = option.envvar or f"{context.auto_envvar_prefix}_{option.name.upper()}"
            settings.append(f"{name}={shell_word(_without_query(os.environ[str(name)]))} ")
    return "".join(settings) + command_line(*map(_without_query, context.find_root().obj))


def _without_query(word: str) -> str:
    """Return a word of a call without the query of a link, whatever weights are behind that."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if SCHEME.match(value):
        with suppress(LoratoolError, click.BadParameter):  # it is no input, but a text
            name = WeightedPath().convert(value, None, None)[0]
            value = without_query(name) + value[len(name) :]
    return option + equals + value
