"""Read a report in a copy of the server of cases, where what it takes and what it makes of the file is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzzing import MOST_MEMORY

import loratool


def read(path: str) -> dict[str, Any]:
    """Return the report as JSON has it, or the error; and the peak of memory."""
    Path("/proc/self/clear_refs").write_text("5")
    try:
        found: dict[str, Any] = {"report": loratool.read_report(path).to_dict()}
    except loratool.InputError as error:
        found = {"error": str(error)}
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return {**found, "too_much": peak if peak > MOST_MEMORY else 0}
