"""Show reports as tables and pictures on a terminal and as JSON to a program; no other module knows rich."""

from __future__ import annotations

from .adapters import (
    print_adapter,
    print_combine,
    print_convert,
    print_extract,
    print_init,
    print_resize,
    print_runtime,
)
from .diffs import print_adapter_diff, print_checkpoint_diff, print_spectra
from .document import print_report
from .guides import print_guide, print_guides
from .models import (
    print_checkpoint,
    print_checkpoint_convert,
    print_count,
    print_method,
    print_unmerge,
    print_verify,
)
from .text import print_lines, to_json

__all__ = [
    "print_adapter",
    "print_adapter_diff",
    "print_checkpoint",
    "print_checkpoint_convert",
    "print_checkpoint_diff",
    "print_combine",
    "print_convert",
    "print_count",
    "print_extract",
    "print_guide",
    "print_guides",
    "print_init",
    "print_lines",
    "print_method",
    "print_report",
    "print_resize",
    "print_runtime",
    "print_spectra",
    "print_unmerge",
    "print_verify",
    "to_json",
]
