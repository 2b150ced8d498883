"""Print the guides: on a terminal their Markdown is laid out, and a pipe gets it unchanged."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from .text import print_table

if TYPE_CHECKING:
    from ...ops.guide import GuideReport

WIDEST = 120  # columns: longer lines are hard to read


OTHER_GUIDE = re.compile(r"\[([\w-]+)\]\(\1\.md\)")  # a link, of which a terminal shows the topic


def print_guides(report: GuideReport) -> None:
    """Print a line for each guide."""
    print_table([("topic", False), ("about", False)], [[each.topic, each.sentence] for each in report.topics])


def print_guide(text: str) -> None:
    """Print a guide, given as Markdown."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    text = OTHER_GUIDE.sub(r"`\1`", text)
    with console.capture() as found:  # rich would turn a closed pipe into exit 1
        laid_out = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
        console.print(laid_out, width=min(console.width, WIDEST))
    print(found.get(), end="")
