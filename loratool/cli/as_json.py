"""Print the one JSON object of a call: the report's own field names under a common header, `views.parts.envelope`.

The module imports nothing else of ours, so that a signal handler can use it during any other import.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from ..views.parts.envelope import envelope

if TYPE_CHECKING:
    from ..errors import LoratoolError

begun = False  # whether the output of a format is being printed, or was


def print_output(text: str) -> None:
    """Print a text of `to_json` or of another format, if it is not empty."""
    global begun
    begun = True
    if text:
        with naming(sys.stdout):
            print(text, flush=True)


@contextmanager
def naming(stream: TextIO) -> Iterator[None]:
    """Set the filename of an error of writing to a stream, as errors of files have."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or stream.name.strip("<>")
        raise


def to_json(
    command: str | None, report: Any = None, error: LoratoolError | None = None, status: str | None = None
) -> str:
    """Return the envelope of a command's report, or of its error, as text."""
    value = envelope(command, None if report is None else asdict(report), error, status)
    return dumps(value)


def dumps(value: Any) -> str:
    """Return a JSON value in one line of ASCII, which any terminal or pipe takes.

    In a log of GitHub Actions it is no workflow command: these start with `##[` anywhere in a line.
    """
    return json.dumps(value, allow_nan=False).replace("##[", "##\\u005b")
