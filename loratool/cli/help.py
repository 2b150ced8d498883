"""Layout of the help: what a command does, its examples, its options under few titles, then further text.

An option names its title where it is declared. The help of every command has titles in the order of TITLES.
"""

from __future__ import annotations

import inspect
from typing import Any

import click

TITLES = ("Output", "Which modules", "Rank and method", "About the inputs", "Checks", "Running")

TERM = 24  # columns for an option and its value; a longer one has its text below


class Option(click.Option):
    """An option with its title, one of TITLES."""

    def __init__(self, *declarations: Any, title: str, **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.title = title


class Command(click.Command):
    """A command whose help begins with its examples. They are the paragraph that its docstring marks with \\b."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_usage(ctx, formatter)
        first, *others = inspect.cleandoc(self.help or "").split("\n\n")
        marked = [text for text in others if text.startswith("\b")]
        _write_paragraphs(formatter, [first, *marked])
        self.format_options(ctx, formatter)
        _write_paragraphs(formatter, [text for text in others if text not in marked])
        self.format_epilog(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in TITLES}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):  # -h is click's own, and names no title
                term, text = record
                rows[getattr(parameter, "title", TITLES[-1])].append((term.ljust(TERM), text))
        for title, under in rows.items():
            if under:
                with formatter.section(title):
                    formatter.write_dl(under, col_max=TERM)


def _write_paragraphs(formatter: click.HelpFormatter, paragraphs: list[str]) -> None:
    for text in paragraphs:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)
