"""Rendering of reports and guides on a terminal or in a pipe."""

from __future__ import annotations

from .document import print_report
from .guides import print_guide, print_guides

__all__ = ["print_guide", "print_guides", "print_report"]
