"""Layout of the help: what a command does, its examples, its options under few titles, then further text.

An option names its title where it is declared. The help of every command has titles in the order of TITLES. `-h` shows
the options of USUAL alone.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import click

TITLES = ("Output", "Which modules", "Rank and method", "About the inputs", "Checks", "Running")

TERM = 24  # columns for an option and its value; a longer one has its text below

EXAMPLES = 3  # that -h shows

# titles, options and examples, below the margin in their first group
STYLES: dict[str, dict[str, Any]] = {
    r"^()(Usage:|[A-Z][a-z ]+:$)": {"bold": True},
    r"^(  )(-\S.*?)(?=  |$)": {"fg": "cyan"},
    r"^(    )(loratool .*)$": {"fg": "green"},
}

# command -> the options that -h shows
USUAL = {
    "apply": "--out --in-place --force --dry-run --step --reverse",
    "combine": "--out --to --force --dry-run --method --rank --density --target --html",
    "convert": "--out --to --for --dtype --max-shard-size --force --dry-run --exclude --base",
    "count": "--rank --target --json",
    "demo": "--force",
    "diff": "--html --layers --fail-above --json",
    "env": "--json",
    "extract": "--out --dtype --force --dry-run --html --target --rank --energy --size",
    "guide": "",
    "init": "--out --force --target --rank --method --seed",
    "inspect": "--base --strict --for --spectra --html --verbose --json",
    "merge": "--out --in-place --force --dry-run --html --dtype --quantized --target --no-undo --replace",
    "patch": "--out --adapter --force --dry-run --to",
    "recover": "--back",
    "resize": "--out --to --force --dry-run --rank --rank-rule",
    "run": "--force --dry-run --locked",
    "unmerge": "--out --in-place --undo --force --dry-run",
    "verify": "--html --attest --exhaustive --verbose --json",
}


class Option(click.Option):
    """An option with its title, one of TITLES, and the words that it takes with their meanings."""

    def __init__(self, *declarations: Any, title: str, meanings: Mapping[str, str] = {}, **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.title, self.meanings = title, meanings


def _help_option(word: str, text: str, usual: bool) -> Option:
    def show(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            assert isinstance(context.command, Command)
            command = context.command
            click.echo(command.usual_help(context) if usual else command.get_help(context), color=context.color)
            context.exit()

    return Option(
        [word],
        title=TITLES[-1],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        allow_from_autoenv=False,  # it would keep every call from its work
        callback=show,
        help=text,
    )


HELP = (
    _help_option("-h", "Show the usual options.", usual=True),
    _help_option("--help", "Show all options.", usual=False),
)


class Command(click.Command):
    """A command whose help begins with its examples. They are the paragraph that its docstring marks with \\b."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **{**attributes, "add_help_option": False})  # which would have no title

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *HELP]

    def get_help(self, ctx: click.Context) -> str:
        return _coloured(super().get_help(ctx), ctx)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_usage(ctx, formatter)
        first, examples, others = self._paragraphs()
        _write_paragraphs(formatter, [first, *examples])
        self.format_options(ctx, formatter)
        _write_paragraphs(formatter, others)
        self.format_epilog(ctx, formatter)

    def usual_help(self, ctx: click.Context) -> str:
        """Return the help of -h: the first examples and the usual options, each with one sentence."""
        formatter = ctx.make_formatter()
        self.format_usage(ctx, formatter)
        first, examples, _ = self._paragraphs()
        shown = ["\n".join(text.splitlines()[: 1 + EXAMPLES]) for text in examples]
        _write_paragraphs(formatter, [first, *shown])
        self.format_usual(ctx, formatter)
        self.format_epilog(ctx, formatter)
        return _coloured(formatter.getvalue().rstrip("\n"), ctx)

    def format_usual(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        usual = {"--help", *USUAL[str(self.name)].split()}
        records = [option.get_help_record(ctx) for option in self._by_title(ctx) if usual & {*option.opts}]
        with formatter.section("Options"):
            formatter.write_dl([(each[0].ljust(TERM), _first_sentence(each[1])) for each in records if each], TERM)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        title = ""
        for option in self._by_title(ctx):
            if option.title != title:
                title = option.title
                formatter.write_paragraph()
                formatter.write_heading(title)
            term, text = option.get_help_record(ctx) or ("", "")
            with formatter.indentation():
                formatter.write_dl([(term.ljust(TERM), text)], TERM)
                if option.meanings:
                    _write_beside(formatter, option.meanings)

    def _by_title(self, ctx: click.Context) -> list[Option]:
        options = [each for each in self.get_params(ctx) if isinstance(each, Option)]
        return sorted(options, key=lambda option: TITLES.index(option.title))

    def _paragraphs(self) -> tuple[str, list[str], list[str]]:
        """Return the first paragraph of the help, its examples, and the others."""
        first, *others = inspect.cleandoc(self.help or "").split("\n\n")
        examples = [text for text in others if text.startswith("\b")]
        return first, examples, [text for text in others if text not in examples]


def _write_beside(formatter: click.HelpFormatter, meanings: Mapping[str, str]) -> None:
    """Write words and their meanings below the text of an option."""
    columns = TERM + 2
    formatter.current_indent += columns
    formatter.width -= formatter.current_indent
    formatter.write_dl([*meanings.items()])
    formatter.width += formatter.current_indent
    formatter.current_indent -= columns


def _first_sentence(text: str) -> str:
    """Return the first sentence of an option's help, and its default."""
    told, gap, default = text.partition("  [")
    return re.split(r"(?<=\.)\s", told)[0] + gap + default


def has_colour(stream: TextIO) -> bool:
    """Return whether a stream shows colour: a terminal, unless NO_COLOR or FORCE_COLOR says otherwise."""
    is_terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    return (is_terminal or bool(os.environ.get("FORCE_COLOR"))) and not os.environ.get("NO_COLOR")


def _coloured(text: str, ctx: click.Context) -> str:
    for pattern, style in STYLES.items() if ctx.color else ():
        text = re.sub(pattern, r"\1" + click.style(r"\2", **style), text, flags=re.MULTILINE)
    return text


def _write_paragraphs(formatter: click.HelpFormatter, paragraphs: Iterable[str]) -> None:
    for text in paragraphs:
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text)
