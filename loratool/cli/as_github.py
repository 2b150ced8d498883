"""Write a check as workflow commands of GitHub Actions, which make annotations.

The form and its escapes are those of packages/core/src/command.ts in actions/toolkit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..views.issues import find_issues
from ..views.parts.document import escape

if TYPE_CHECKING:
    from ..errors import LoratoolError
    from ..views.parts.report import Report

DATA = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})

PROPERTY = {**DATA, **str.maketrans({":": "%3A", ",": "%2C"})}


def to_github(
    command: str | None, report: Report | None = None, error: LoratoolError | None = None, status: str | None = None
) -> str:
    """Return a line for each issue of a report, or one for an error. A report without issues has none."""
    lines = []
    if error:
        text = "\n".join(map(escape, [*error.what, *([f"hint: {error.remedy}"] if error.remedy else [])]))
        lines.append(_annotation("error", f"loratool {command or ''}".strip(), text))
    for issue in find_issues(report, status):
        lines.append(_annotation(issue.level, f"loratool {command}: {issue.kind}", issue.text, file=issue.file))
    return "\n".join(lines)


def _annotation(level: str, title: str, message: str, **place: str) -> str:
    words = {"title": title, **place}
    properties = ",".join(f"{key}={escape(value).translate(PROPERTY)}" for key, value in words.items())
    return f"::{level} {properties}::{message.translate(DATA)}"
