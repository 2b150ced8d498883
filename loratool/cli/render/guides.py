"""Print the guides. A terminal gets the Markdown laid out, in PAGER if that is set; a pipe gets it unchanged."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from typing import TYPE_CHECKING

import click

from ..surface import WIDEST, terminal_width

if TYPE_CHECKING:
    from ...commands.guide import GuideReport

OTHER_GUIDE = re.compile(r"\[([\w-]+)\]\(\1\.md(?:#[\w-]+)?\)")  # a link, of which a terminal shows the topic
SAME_GUIDE = re.compile(r"\[([^\]]+)\]\(#[\w-]+\)")  # a link, of which a terminal shows the title
PICTURE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")  # of which a terminal shows the words


def print_guides(report: GuideReport) -> None:
    """Print a line for each guide, or more on a narrow terminal, under the kind of page."""
    from ...commands.guide import PAGES

    width = min(terminal_width(sys.stdout), WIDEST) if sys.stdout.isatty() else sys.maxsize
    sentences = {topic.topic: topic.sentence for topic in report.topics}
    indent = max(map(len, sentences)) + 4
    for kind, names in PAGES.items():
        print(kind)
        for name in names:
            head = f"  {name}".ljust(indent)
            print(textwrap.fill(sentences[name], width, initial_indent=head, subsequent_indent=" " * indent))


def print_guide(text: str) -> None:
    """Print a guide, given as Markdown."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    text = SAME_GUIDE.sub(r"\1", OTHER_GUIDE.sub(r"`\1`", text))
    text = PICTURE.sub(r"*Picture: \1.*", text)
    with console.capture() as captured:  # rich would turn a closed pipe into exit 1
        laid_out = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
        console.print(laid_out, width=min(console.width, WIDEST))
    if os.environ.get("PAGER"):
        click.echo_via_pager(captured.get(), color=True)
    else:
        print(captured.get(), end="")
