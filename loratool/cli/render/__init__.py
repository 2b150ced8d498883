"""Show reports as documents and guides on a terminal or in a pipe, and as JSON to a program."""

from __future__ import annotations

from .as_json import to_json
from .document import print_report
from .guides import print_guide, print_guides

__all__ = ["print_guide", "print_guides", "print_report", "to_json"]
