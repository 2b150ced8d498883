"""Wrap a report in the versioned header that `--json` prints and a page holds.

The module imports nothing of ours but errors, so that a signal handler can use it during any other import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import without_credentials

if TYPE_CHECKING:
    from ...errors import LoratoolError

SCHEMA_VERSION = 2

BEGIN = "<!doctype html><!-- a page of loratool -->"  # of a page, by which it is known as one

REPORT_TAG = '<script type="application/json" id="report">'  # of the element of a page that holds the object


def envelope(
    verb: str | None,
    report: Mapping[str, Any] | None = None,
    error: LoratoolError | None = None,
    status: str | None = None,
) -> dict[str, Any]:
    """Return one object: `schema`, `verb`, `ok`, `exit_code`, and either `report` or `error`.

    `loratool COMMAND --json-schema` prints its schema.

    Args:
        verb: the command; None for a call that names none.
        report: its fields.
        status: the word for a failed check (exit code 1).
    """
    value: dict[str, Any] = {"schema": SCHEMA_VERSION, "verb": verb, "ok": error is None and status is None}
    value["exit_code"] = 0 if status is None else 1
    if status is not None:
        value["status"] = status
    if error is not None:
        value["exit_code"] = error.exit_code
        value["error"] = {
            "kind": error.kind,
            "message": error.message,
            "tensor": error.culprit,
            "remedy": error.remedy,
        }
    else:
        value["report"] = _shareable(report)
    return value


def _shareable(value: Any) -> Any:
    """Return a JSON value without the credentials in its texts."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {key: _shareable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_shareable(each) for each in value)
    return value
