"""Define the options that several commands share, one spelling and one meaning each, and their types."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from ..binding.modules.selection import PRESETS
from ..commands.arguments import parse_count, parse_size
from ..commands.choices import DROP_CHOICES
from ..errors import UsageError, brief
from ..files.dtypes import FACTOR_DTYPES as DTYPES
from ..transform.rank_rules import ALONE, RANK_RULES, RULES_OF_SEVERAL
from .help import Decorated, option

SELECTIONS = ("all-linear", *PRESETS, "experts")  # the patterns with names


PATTERNS = (
    "a comma list of the ends of their paths (q_proj), globs of whole paths (*.mlp.*), re:EXPRESSION, or "
    f"{', '.join(SELECTIONS)}"
)


PATH = click.Path(readable=False)  # shells complete it; whether it is there the library says


def complete_from(*words: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Make a shell completion of these words, also after commas; the library refuses other words."""

    def complete(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + word for word in words if word.startswith(last)]

    return complete


alpha_option = option(
    "--alpha",
    title="About the inputs",
    type=float,
    metavar="N",
    help="The adapter's alpha, where its file does not say it. A contradiction is an error.",
)


def _hide_downloads(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Tell huggingface_hub, which is loaded later if it is needed, to show no progress; what the user set holds."""
    if value:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return value


def _print_schema(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from .as_json import print_json
        from .schemas import make

        print_json(json.dumps(make(str(context.command.name)), indent=2))
        context.exit()


def json_option(command: Decorated) -> Decorated:
    """Add the options --json and --json-schema, which prints the schema of what --json prints."""
    schema = option(
        "--json-schema",
        title="Running",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        allow_from_autoenv=False,  # it would keep every call from its work
        callback=_print_schema,
        help="Print the JSON Schema of what --json prints.",
    )
    flag = option(
        "--json",
        title="Running",
        is_flag=True,
        callback=_hide_downloads,
        help="Print one JSON object on stdout, errors too.",
    )
    return flag(schema(command))


quiet_option = option(
    "-q",
    "--quiet",
    title="Running",
    is_flag=True,
    callback=_hide_downloads,
    help="Only the verdict, warnings and hints; no table, no progress.",
)


verbose_option = option(
    "-v", "--verbose", title="Running", is_flag=True, help="A row for every module, nothing cut short."
)


force_option = option("--force", title="Output", is_flag=True, help="Replace an output that exists (model files only).")


resume_option = option(
    "--resume",
    title="Output",
    is_flag=True,
    help="Go on where a run with the same inputs and options died, if one did. Inputs are compared by path, size, time "
    "and samples of their bytes.",
)


card_option = option(
    "--no-card", title="Output", is_flag=True, help="Leave out the model card, README.md, of a folder."
)


dry_run_option = option(
    "--dry-run", title="Output", is_flag=True, help="Check everything, print the plan, write nothing."
)


device_option = option(
    "--device",
    title="Running",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where to compute.",
    shell_complete=complete_from("auto", "cpu", "cuda"),
)


def intruder_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of what `--spectra` calls new."""
    for each in (
        option(
            "--threshold",
            title="Checks",
            type=click.FloatRange(0, 1, min_open=True),
            metavar="X",
            help="With --spectra: what has a |cosine| of X with one of the base's singular vectors is not new.  "
            "[default: 0.5]",
        ),
        option(
            "--top",
            title="Checks",
            type=click.IntRange(1),
            metavar="K",
            help="With --spectra: look at the K leading singular vectors of each changed matrix.  [default: 10]",
        ),
    ):
        command = each(command)
    return command


target_option = option(
    "--target",
    title="Which modules",
    multiple=True,
    metavar="PATTERNS",
    shell_complete=complete_from(*SELECTIONS),
    help=f"Only these modules: {PATTERNS}.",
)


exclude_option = option(
    "--exclude",
    title="Which modules",
    multiple=True,
    metavar="PATTERNS",
    shell_complete=complete_from(*SELECTIONS),
    help="Leave these modules out; patterns as of merge --target.",
)


class _Words(click.Choice[str]):
    """Some of the choices, separated by commas."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        words = [super(_Words, self).convert(word, param, ctx) for word in str(value).split(",")]
        return ",".join(words)


def _split_words(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for words in value for word in words.split(","))


def make_drop_option(words: Mapping[str, str]) -> Callable[[Any], Any]:
    """Make the option --drop for some kinds of things; `words` are their names with their meanings."""
    return option(
        "--drop",
        title="Which modules",
        multiple=True,
        type=_Words(list(words)),
        callback=_split_words,
        help="Leave out " + "; ".join(f"{word}: {meaning}" for word, meaning in words.items()) + ".",
    )


drop_option = make_drop_option(DROP_CHOICES)


architecture_option = option(
    "--architecture",
    title="Output",
    metavar="CLASS",
    help="The class that PEFT will wrap, as LlamaForCausalLM inside a Llava; for convert of an image model's adapter "
    "its family, as flux.  [default: config.json's]",
)


labels_option = option(
    "--labels",
    title="Output",
    metavar="A,B,...",
    multiple=True,
    callback=_split_words,
    help="The names of the labels of the output's head.  [default: the adapter's, or LABEL_0, LABEL_1, ...]",
)


layers_option = option(
    "--layers", title="Which modules", metavar="0-15,20", help="Only modules of these layers, counted from 0."
)


# command -> the name of its output without -o
OUTS = {
    "combine": "combined",
    "extract": "adapter",
    "init": "adapter",
    "merge": "merged",
    "resize": "resized",
    "unmerge": "unmerged",
}


def out_option(command: str) -> Callable[[Any], Any]:
    """Make the option -o of a command of OUTS, whose default is a folder of that name, or a file."""
    name = OUTS[command]
    help = f"A folder, or a .safetensors file, of a GGUF base a .gguf file.  [default: {name}, or {name}.safetensors]"
    return option("-o", "--out", title="Output", type=PATH, metavar="OUT", help=help)


def dtype_option(help: str) -> Callable[[Any], Any]:
    """Make the option --dtype, which takes any word: torch's and numpy's names are dtypes too, as the library knows."""
    return option(
        "--dtype",
        title="Output",
        default="keep",
        show_default=True,
        metavar="keep|fp32|bf16|fp16",
        shell_complete=complete_from("keep", *DTYPES),
        help=help,
    )


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


html_option = option(
    "--html",
    title="Output",
    type=PATH,
    metavar="FILE",
    callback=_check_page,
    help="Write the report, of a dry run too, as a page: all its rows, pictures and JSON in one .html file; needs "
    "loratool[html].",
)


PATTERN_OPTIONS = ("target", "exclude")


save_recipe_option = option(
    "--save-recipe",
    title="Running",
    type=PATH,
    metavar="FILE",
    help="Write this call as a recipe for loratool run, .yaml or .json.",
)


def run_command(function: Callable[..., Any], options: Mapping[str, Any], progress: Callable[[int, int], None]) -> Any:
    """Call the library's function with click's options, and write the recipe of the call if that is asked for.

    A page (`html`) is no part of either: it is of the report, and refused here where it has the output's place.
    """
    from pathlib import Path

    from ..commands.run.write import check_recipe_path, recipe_of, write_recipe
    from ..files.output.paths import require_outside

    own = {name: value for name, value in options.items() if name not in ("save_recipe", "html")}
    arguments = library_arguments(own)
    if (page := options.get("html")) is not None:
        require_outside(Path(page), Path(options["out"] or OUTS[function.__name__]))
    place = options["save_recipe"]
    if place is not None:
        check_recipe_path(Path(place), options["force"], options["dry_run"])
    report = function(**arguments, progress=progress)
    if place is not None:
        write_recipe(Path(place), recipe_of(function, arguments, report.out))
    return report


def library_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return click's options as keyword arguments of the library's function.

    A flag `no_x` is x's contrary there. Patterns that were not given are left to the function's own default.
    """
    arguments: dict[str, Any] = {}
    for name, value in options.items():
        if name in PATTERN_OPTIONS:
            if value:
                arguments[name] = value
        elif name.startswith("no_"):
            arguments[name.removeprefix("no_")] = not value
        else:
            arguments[name] = value
    for name in {"rank_pattern", "set"} & arguments.keys():
        arguments[name] = dict(arguments[name])
    return arguments


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


def rank_option(help: str) -> Callable[[Any], Any]:
    return option("--rank", title="Rank and method", type=click.IntRange(1), metavar="N", help=help)


energy_option = option(
    "--energy",
    title="Rank and method",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="0.95",
    help="Keep this share of each module's delta.",
)


params_option = option(
    "--params",
    title="Rank and method",
    type=COUNT,
    metavar="20M",
    help="Budget for the whole adapter, in parameters, spent by energy per parameter.",
)


size_option = option(
    "--size",
    title="Rank and method",
    type=SIZE,
    metavar="40MB",
    help="Budget for the whole adapter, in bytes, spent by energy per parameter.",
)


max_rank_option = option(
    "--max-rank", title="Rank and method", type=click.IntRange(1), metavar="N", help="Upper limit for any module."
)


imatrix_option = option(
    "--imatrix",
    title="Rank and method",
    type=PATH,
    metavar="FILE",
    help="A file of llama-imatrix, by which each module is the best of its rank for its outputs.",
)


factor_dtype_option = option(
    "--dtype",
    title="Output",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="Dtype of the factors.",
)


def seed_option(help: str) -> Callable[[Any], Any]:
    return option("--seed", title="Rank and method", type=int, default=0, show_default=True, metavar="N", help=help)


class Slices(click.ParamType[tuple[bool, ...]]):
    """The slices of a fused module, yes or no for each: `1,0,1`."""

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
    """A key of metadata and its value: `KEY=VALUE`, of which the value may have more equals signs."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not (key and equals):
            self.fail(f"{brief(value)} is not KEY=VALUE, like modelspec.title=Ink", param, ctx)
        return key, text


class RuleValue(click.ParamType[tuple[str, float]]):
    """A rank rule and its number: `NAME=VALUE`, or the name alone of a rule whose number is 1 if it is not said."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, _, number = (f"{value}=1" if value in ALONE else value).partition("=")
        try:
            return name, float(number)
        except ValueError:
            self.fail(f"{brief(value)} is not NAME=VALUE, like sv_fro=0.9, or noise", param, ctx)


_RULE: dict[str, Any] = {"title": "Rank and method", "type": RuleValue()}


rank_rule_option = option(
    "--rank-rule",
    metavar="NAME[=VALUE]",
    help=f"Rank rule of each module: one of {', '.join(RANK_RULES)}. noise: what rounding cannot have made, "
    "or what is larger than VALUE times its bound.",
    **_RULE,
)


rank_rule_of_several_option = option(
    "--rank-rule",
    metavar="NAME=VALUE",
    help=f"Rank rule of each module: one of {', '.join(RULES_OF_SEVERAL)}.",
    **_RULE,
)


Weighted = tuple[str, float] | tuple[str, float, dict[str, float]]


# A component or pattern, and its weight; an expression ends before the first `=` with a number behind it
_MODULE_WEIGHT = re.compile(r"(re:.+?|[^,:=]*)=(\s*[-+]?(?:[\d.]+(?:e[-+]?\d+)?|inf|nan)\s*)(?:,|$)", re.IGNORECASE)


def _parse_weights(text: str) -> tuple[float, list[tuple[str, float]]] | None:
    """Parse `0.8,te=0.4,PATTERN=0.5`, where the first is 1 if it is left out; return None for anything else."""
    first, comma, rest = text.partition(",")
    pairs, at = list[tuple[str, float]](), 0
    try:
        weight, rest = (1.0, text) if _MODULE_WEIGHT.match(text) else (float(first), rest)
        while found := _MODULE_WEIGHT.match(rest, at):
            pairs.append((found[1].strip(), float(found[2])))
            at = found.end()
    except ValueError:
        return None
    return None if at < len(rest) or (comma and text.endswith(",")) else (weight, pairs)


class WeightedPath(click.ParamType[Weighted]):
    """An adapter and its weight: `PATH`, `PATH:WEIGHT`, or `PATH:WEIGHT,te=WEIGHT,PATTERN=WEIGHT` for some modules.

    Only a colon before nothing but weights counts: `C:\\x.safetensors` is a path.
    """

    name = "adapter[:weight]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Weighted:
        if isinstance(value, tuple):
            return value
        if os.path.exists(value):
            return value, 1.0
        splits = [(value[: at.start()], value[at.end() :]) for at in re.finditer(":", value)]
        for path, text in splits:
            if found := _parse_weights(text):
                weight, pairs = found
                if len(dict(pairs)) < len(pairs):
                    self.fail(f"{text!r} weighs a component or pattern twice", param, ctx)
                return (path, weight, dict(pairs)) if pairs else (path, weight)
        for path, text in reversed(splits):
            if os.path.exists(path):
                self.fail(f"{text!r} is not a weight, like 0.7", param, ctx)
        return value, 1.0

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]
