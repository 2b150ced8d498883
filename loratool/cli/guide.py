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
    help="Print where the guides are: their folder, or the file of TOPIC.",
)


@click.command(
    cls=Command, params=[click.Argument(["topic"], required=False, shell_complete=_complete), PATH, JSON, JSON_SCHEMA]
)
def guide(topic: str | None, path: bool, json: bool) -> None:
    """Read the manual, a page for each job; without TOPIC the pages are listed.

    A terminal gets the text laid out, through PAGER if that is set, a pipe or a file the Markdown itself.

    \b
      loratool guide
      loratool guide tutorial
      loratool guide --path
    """
    from ..commands.guide import guide as run
    from .as_json import naming, print_json, to_json
    from .render import print_guide, print_guides

    report = run(topic)
    with naming(sys.stdout):
        if json:
            print_json(to_json("guide", report))
        elif path:
            print(Path(report.folder, f"{topic}.md") if topic else report.folder)
        elif report.text is not None:
            print_guide(report.text)
        else:
            print_guides(report)
        sys.stdout.flush()
