"""The formats of --output-format, for the commands that check. That of a format is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

COMMANDS = ("verify", "inspect", "diff")  # commands with --output-format

# format -> the function of this package that makes its document of (command, report, error, status); text has none
FORMATS = {
    "text": "",
    "json": "as_json.to_json",
    "github": "as_github.to_github",
    "sarif": "as_sarif.to_sarif",
    "junit": "as_junit.to_junit",
}


def writer_of(name: str) -> Callable[..., str]:
    """Return the function of a format that is not text."""
    module, _, function = FORMATS[name].partition(".")
    writer: Callable[..., str] = getattr(import_module(f".{module}", __package__), function)
    return writer
