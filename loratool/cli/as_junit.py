"""Write a check as a JUnit report: a test case for each kind of issue that was looked for, and one for the command.

So the same call has the same cases in every run. The form is that of junit-10.xsd in jenkinsci/xunit-plugin.
"""

from __future__ import annotations

from html import escape as quote
from typing import TYPE_CHECKING

from ..views.issues import CheckIssue, find_issues, kinds_of
from ..views.parts.document import escape

if TYPE_CHECKING:
    from ..errors import LoratoolError
    from ..views.parts.report import Report

COMPLETED = "completed"  # the case of the command itself, which only an error fails


def to_junit(
    command: str | None, report: Report | None = None, error: LoratoolError | None = None, status: str | None = None
) -> str:
    """Return a document with one suite."""
    suite = f"loratool {command or ''}".strip()
    cases = [_case(suite, COMPLETED, _error(error) if error else "")]
    issues = find_issues(report, status)
    for kind in kinds_of(report):
        cases.append(_case(suite, kind, _outcome([each for each in issues if each.kind == kind])))
    failures = len({each.kind for each in issues if each.level == "error"})
    counts = f'tests="{len(cases)}" failures="{failures}" errors="{int(error is not None)}"'
    lines = [f'<testsuites name="loratool" {counts}>', f'<testsuite name="{quote(suite)}" {counts}>']
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', *lines, *cases, "</testsuite>", "</testsuites>"])


def _case(suite: str, name: str, outcome: str) -> str:
    return f'<testcase classname="{quote(suite)}" name="{name}">{outcome}</testcase>'


def _outcome(issues: list[CheckIssue]) -> str:
    """Return the failure of a case, or what it prints if its issues are only warnings."""
    if not issues:
        return ""
    lines = [line for issue in issues for line in (f"{issue.file}: {issue.message}", *(f"  {n}" for n in issue.names))]
    body = _text("\n".join(map(escape, lines)))
    if all(issue.level == "warning" for issue in issues):
        return f"<system-out>{body}</system-out>"
    return f'<failure type="{issues[0].kind}" message="{_text(issues[0].text)}">{body}</failure>'


def _error(error: LoratoolError) -> str:
    lines = [*error.what, *([f"hint: {error.remedy}"] if error.remedy else [])]
    body = _text("\n".join(map(escape, lines)))
    return f'<error type="{error.kind}" message="{_text(escape(error.what[0]))}">{body}</error>'


def _text(text: str) -> str:
    """Return a text as XML in ASCII. In a log of GitHub Actions it is no workflow command (`surface.inert`)."""
    text = quote(text).replace("::", ":&#58;").replace("##[", "##&#91;")
    return text.encode("ascii", "xmlcharrefreplace").decode()
