"""Click's types for the library's arguments, and the options that only the terminal has."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..commands.arguments import parse_count, parse_size
from ..errors import UsageError, brief, install_remedy
from ..transform.rank_rules import ALONE
from .help import Option
from .output_formats import FORMATS

PATH = click.Path(readable=False)  # shells complete it; whether it is there the library says


def complete_from(*words: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Return a shell completion of these words, also after commas. The library refuses other words."""

    def complete(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + word for word in words if word.startswith(last)]

    return complete


def _hide_downloads(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Set the environment so that huggingface_hub, if loaded later, shows no progress. A user's setting wins."""
    if value and value != "text":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return value


def _print_schema(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from .as_json import print_output
        from .schemas import make

        print_output(json.dumps(make(str(context.command.name)), indent=2))
        context.exit()


JSON = Option(
    ["--json"],
    title="Running",
    is_flag=True,
    callback=_hide_downloads,
    help="Print the report, or the error, as one JSON object on stdout.",
)

OUTPUT_FORMAT = Option(
    ["--output-format"],
    title="Running",
    type=click.Choice([*FORMATS]),
    callback=_hide_downloads,
    help="Print what the check found in this format: annotations of GitHub Actions, SARIF or JUnit. json is --json.",
)

JSON_SCHEMA = Option(
    ["--json-schema"],
    title="Running",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    allow_from_autoenv=False,  # it would keep every call from its work
    callback=_print_schema,
    help="Print the JSON Schema of the --json output.",
)

QUIET = Option(
    ["-q", "--quiet"],
    title="Running",
    is_flag=True,
    callback=_hide_downloads,
    help="Print only the verdict, warnings and hints.",
)

VERBOSE = Option(["-v", "--verbose"], title="Running", is_flag=True, help="Print a row for every module, unshortened.")

TERMINAL = (QUIET, VERBOSE, JSON, JSON_SCHEMA)  # of every command with a report

CHECK = (QUIET, VERBOSE, JSON, OUTPUT_FORMAT, JSON_SCHEMA)  # of those in `output_formats.COMMANDS`


def chosen_format(json: bool, output_format: str | None) -> str:
    """Return the format of --json and --output-format, a key of FORMATS."""
    if json and output_format not in (None, "json"):
        raise click.UsageError(f"--json and --output-format {output_format} exclude each other")
    return "json" if json else output_format or "text"


class SomeOf(click.Choice[str]):
    """One or more of the choices, separated by commas."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        words = [super(SomeOf, self).convert(word, param, ctx) for word in str(value).split(",")]
        return ",".join(words)


def split_words(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for words in value for word in words.split(","))


def _check_page(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a page that cannot be written, before any work."""
    if value is not None and not context.resilient_parsing:
        from ..commands.report_files import check_page_path

        try:
            check_page_path(value)
        except UsageError as error:
            if error.argument:  # that of the function, which `inspect` has too
                error.argument = error.culprit = parameter.name
            raise
    return value


HTML = Option(
    ["--html"],
    title="Output",
    type=PATH,
    metavar="FILE",
    callback=_check_page,
    help="Also write the report, even of a dry run, as one .html page with all rows, pictures and the JSON. Needs "
    f"Jinja2: {install_remedy('html')}.",
)

SAVE_RECIPE = Option(
    ["--save-recipe"],
    title="Running",
    type=PATH,
    metavar="FILE",
    help="Save this call as a recipe (.yaml or .json) for `loratool run`.",
)

LOCK = Option(
    ["--lock"],
    title="Running",
    is_flag=True,
    help="With --save-recipe, also write its lock: the digests of inputs and outputs, for `loratool run --locked`.",
)


class _Amount(click.ParamType[int]):
    """Read a size or a count, as the library does."""

    def __init__(self, name: str, parse: Callable[[str], int | None]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)


SIZE = _Amount("size", parse_size)

COUNT = _Amount("count", parse_count)


class Slices(click.ParamType[tuple[bool, ...]]):
    """The selected slices of a fused module, 1 or 0 for each: `1,0,1`."""

    name = "slices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[bool, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[01](,[01])*", value) or "1" not in value:
            self.fail(f"{brief(value)} is not like 1,0,1", param, ctx)
        return tuple(each == "1" for each in value.split(","))


class PatternRank(click.ParamType[tuple[str, int]]):
    """A rank by pattern: `PATTERN=RANK`, a pattern as in --target."""

    name = "pattern=rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        pattern, _, rank = value.rpartition("=")
        if not pattern or not re.fullmatch(r"\d{1,6}", rank) or int(rank) < 1:
            self.fail(f"{brief(value)} is not PATTERN=RANK, like down_proj=16", param, ctx)
        return pattern, int(rank)


class KeyValue(click.ParamType[tuple[str, str]]):
    """A key of metadata and its value: `KEY=VALUE`. The value may have equals signs."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not (key and equals):
            self.fail(f"{brief(value)} is not KEY=VALUE, like modelspec.title=Ink", param, ctx)
        return key, text


class RuleValue(click.ParamType[tuple[str, float]]):
    """A rank rule and its number: `NAME=VALUE`, or `NAME` for rules with the default 1."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, _, number = (f"{value}=1" if value in ALONE else value).partition("=")
        try:
            return name, float(number)
        except ValueError:
            self.fail(f"{brief(value)} is not NAME=VALUE, like sv_fro=0.9, or noise", param, ctx)


Weighted = tuple[str, float] | tuple[str, float, dict[str, float]]

# A component or pattern, and its weight; an expression ends before the first `=` with a number behind it
_MODULE_WEIGHT = re.compile(r"(re:.+?|[^,:=]*)=(\s*[-+]?(?:[\d.]+(?:e[-+]?\d+)?|inf|nan)\s*)(?:,|$)", re.IGNORECASE)


def _parse_weights(text: str) -> tuple[float, list[tuple[str, float]]] | None:
    """Parse `0.8,te=0.4,PATTERN=0.5`. The default of the first number is 1. Return None for any other text."""
    first, comma, rest = text.partition(",")
    pairs, position = list[tuple[str, float]](), 0
    try:
        weight, rest = (1.0, text) if _MODULE_WEIGHT.match(text) else (float(first), rest)
        while match := _MODULE_WEIGHT.match(rest, position):
            pairs.append((match[1].strip(), float(match[2])))
            position = match.end()
    except ValueError:
        return None
    return None if position < len(rest) or (comma and text.endswith(",")) else (weight, pairs)


class WeightedPath(click.ParamType[Weighted]):
    """An adapter and its weight: `PATH`, `PATH:WEIGHT`, or `PATH:WEIGHT,te=WEIGHT,PATTERN=WEIGHT` for some modules.

    A colon counts only if nothing but weights follows: `C:\\x.safetensors` is a path.
    """

    name = "adapter[:weight]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Weighted:
        if isinstance(value, tuple):
            return value
        if os.path.exists(value):
            return value, 1.0
        splits = [(value[: at.start()], value[at.end() :]) for at in re.finditer(":", value)]
        for path, text in splits:
            if parsed := _parse_weights(text):
                weight, pairs = parsed
                if len(dict(pairs)) < len(pairs):
                    self.fail(f"{text!r} weighs a component or pattern twice", param, ctx)
                return (path, weight, dict(pairs)) if pairs else (path, weight)
        for path, text in reversed(splits):
            if os.path.exists(path):
                self.fail(f"{text!r} is not a weight, like 0.7", param, ctx)
        return value, 1.0

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]
