"""Write a check in SARIF 2.1.0, which code scanning reads: https://docs.oasis-open.org/sarif/sarif/v2.1.0/.

Each kind of issue is a rule. An error of the command is a notification of an invocation that was not successful.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .. import errors
from ..files.hub.names import SCHEME
from ..views.issues import KINDS, CheckIssue, find_issues
from ..views.parts.document import escape
from .as_json import dumps

if TYPE_CHECKING:
    from ..views.parts.report import Report

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

VERSION = version("loratool")  # read here, as a signal handler may import nothing

GUIDE = "ci.html#what-checks-find"


def to_sarif(
    command: str | None,
    report: Report | None = None,
    error: errors.LoratoolError | None = None,
    status: str | None = None,
) -> str:
    """Return a log with one run: a result for each issue of a report, or the notification of an error."""
    issues = find_issues(report, status)
    code = error.exit_code if error else 1 if status else 0
    invocation: dict[str, Any] = {"executionSuccessful": error is None, "exitCode": code}
    if error:
        text = "\n".join(map(escape, [*error.what, *([error.remedy] if error.remedy else [])]))
        note = {"level": "error", "message": {"text": text}, "descriptor": {"id": error.kind}}
        invocation["toolExecutionNotifications"] = [note]
    driver = {"name": "loratool", "version": VERSION, "rules": [_rule(kind) for kind in KINDS]}
    home = errors.SITE or errors.REPOSITORY
    run = {
        "tool": {"driver": {**driver, **({"informationUri": home} if home else {})}},
        "automationDetails": {"id": f"loratool/{command}/" if command else "loratool/"},
        "invocations": [invocation],
        "results": [_result(issue) for issue in issues],
    }
    return dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def _rule(kind: str) -> dict[str, Any]:
    level = "warning" if kind == "warning" else "error"
    return {
        "id": kind,
        "shortDescription": {"text": f"{KINDS[kind]}."},
        "fullDescription": {"text": f"{KINDS[kind]}."},  # code scanning wants both
        "help": {"text": "loratool guide ci"},
        "defaultConfiguration": {"level": level},
        **({"helpUri": f"{errors.SITE}/{GUIDE}"} if errors.SITE else {}),
    }


def _result(issue: CheckIssue) -> dict[str, Any]:
    place: dict[str, Any] = {
        # code scanning takes no result without a line
        "physicalLocation": {"artifactLocation": {"uri": _uri(issue.file)}, "region": {"startLine": 1}}
    }
    if issue.names:
        place["logicalLocations"] = [{"fullyQualifiedName": escape(name)} for name in issue.names]
    return {
        "ruleId": issue.kind,
        "ruleIndex": [*KINDS].index(issue.kind),
        "level": issue.level,
        "message": {"text": issue.text},
        "locations": [place],
    }


def _uri(file: str) -> str:
    """Return the URI of a path or a link. A relative path stays one."""
    file = errors.without_credentials(file)
    if SCHEME.match(file):
        return quote(file, safe=":/?#[]@!$&'()*+,;=%")
    return Path(file).as_uri() if os.path.isabs(file) else quote(os.fsencode(Path(file).as_posix()))
