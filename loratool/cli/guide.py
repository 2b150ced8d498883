"""Define the command `loratool guide`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .help import Command, Option
from .options import JSON, JSON_SCHEMA


def _complete(context: click.Context, argument: click.Parameter, incomplete: str) -> list[str]:
    from ..commands.guide import topics

    return [name for name in topics() if name.startswith(incomplete)]


PATH = Option(
    ["--path"],
    title="Running",
    is_flag=True,
    help="Print the path of the guides' folder, or of TOPIC's file.",
)


@click.command(
    cls=Command, params=[click.Argument(["topic"], required=False, shell_complete=_complete), PATH, JSON, JSON_SCHEMA]
)
def guide(topic: str | None, path: bool, json: bool) -> None:
    """Read a page of the manual, or without TOPIC list all pages.

    On a terminal the page is formatted, and shown with PAGER if that is set. A pipe or a file gets the Markdown.

    \b
      loratool guide
      loratool guide tutorial
      loratool guide --path
    """
    from ..commands.guide import guide as run
    from .as_json import naming, print_output, to_json
    from .render import print_guide, print_guides

    report = run(topic)
    with naming(sys.stdout):
        if json:
            print_output(to_json("guide", report))
        elif path:
            print(Path(report.folder, f"{topic}.md") if topic else report.folder)
        elif report.text is not None:
            print_guide(report.text)
        else:
            print_guides(report)
        sys.stdout.flush()
