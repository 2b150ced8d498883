"""Print the one JSON object of a call: its schema is versioned, the report's own field names under a common header.

It imports nothing of ours, so that a signal's handler can use it while anything else is being imported.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..errors import LoratoolError

SCHEMA_VERSION = 1

begun = False  # whether the object is being printed, or was


def print_json(text: str) -> None:
    """Print what `to_json` returned."""
    global begun
    begun = True
    print(text)
    sys.stdout.flush()


def to_json(
    command: str | None, report: Any = None, error: LoratoolError | None = None, status: str | None = None
) -> str:
    """Return one object: `schema`, `verb`, `ok`, `exit_code`, and either `report` or `error`.

    `cli/schemas/` has it in full. `status` is there if a check said no (exit code 1), and says what it found. `verb` is
    null for a call that names no command.
    """
    value: dict[str, Any] = {"schema": SCHEMA_VERSION, "verb": command, "ok": error is None and status is None}
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
        value["report"] = asdict(report)
    return json.dumps(value, allow_nan=False)  # ASCII, so that any terminal or pipe takes it
