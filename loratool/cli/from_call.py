"""Build click commands from the library's functions: each argument becomes one of the command line.

Meaning, default and section of the help come from the call (`commands.calls`). One table maps its type to click's. A
function that takes `out` gets --save-recipe and --lock.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from ..commands.adapter_requests import ADAPTERS_TYPE
from ..commands.arguments import (
    COUNT_TYPE,
    PATH_TYPE,
    PATHS_TYPE,
    PATTERNS_TYPE,
    POSITIVE_TYPE,
    SIMPLE,
    SIZE_TYPE,
    Argument,
    ArgumentType,
    Positive,
    arguments_of,
    type_of,
)
from ..commands.calls import RULE_OF_SEVERAL_TYPE, RULE_TYPE, SELECTIONS
from ..errors import UsageError
from .help import Command, Option
from .options import (
    COUNT,
    HTML,
    LOCK,
    PATH,
    SAVE_RECIPE,
    SIZE,
    TERMINAL,
    KeyValue,
    PatternRank,
    RuleValue,
    Slices,
    SomeOf,
    WeightedPath,
    complete_from,
    split_words,
)

# types of which several are given, each as a pair
PAIRS: dict[ArgumentType, Any] = {
    type_of(Mapping[str, Positive]): PatternRank(),
    type_of(Mapping[str, str]): KeyValue(),
}

# type of an argument -> click's; of those that are not here, texts that the library reads
TYPES: dict[ArgumentType, Any] = {
    PATH_TYPE: PATH,
    PATHS_TYPE: PATH,
    SIZE_TYPE: SIZE,
    COUNT_TYPE: COUNT,
    POSITIVE_TYPE: click.IntRange(1),
    SIMPLE[int]: int,
    SIMPLE[float]: float,
    ADAPTERS_TYPE: WeightedPath(),
    RULE_TYPE: RuleValue(),
    RULE_OF_SEVERAL_TYPE: RuleValue(),
    type_of(Sequence[bool]): Slices(),
    **PAIRS,
}


def options_for(function: Callable[..., Any], *names: str) -> list[click.Parameter]:
    """Return click's arguments and options for arguments of a function. The default is all of the command line."""
    given = arguments_of(function)
    shown = names or [name for name, each in given.items() if not each.named or (each.opt and each.opt.title)]
    return [_parameter_of(given[name]) for name in shown]


def _parameter_of(argument: Argument) -> click.Parameter:
    kind, opt = argument.type, argument.opt
    attributes: dict[str, Any] = {"type": _type_of(argument), "metavar": (opt and opt.metavar) or None}
    if not opt or not opt.title:
        nargs = -1 if kind.several or not argument.required else 1
        return click.Argument([argument.name], nargs=nargs, required=argument.required, **attributes)
    if kind is SIMPLE[bool]:
        attributes |= {"is_flag": True, "type": None}
    elif kind.several or kind in PAIRS:
        attributes["multiple"] = True
    elif argument.default not in (None, ()) and not argument.required:
        attributes |= {"default": argument.default, "show_default": True}
    if (kind.several and kind.choices) or opt.commas:
        attributes["callback"] = split_words
    if kind in PAIRS:
        attributes["callback"] = lambda context, option, value: dict(value)
    if words := _completions(argument):
        attributes["shell_complete"] = complete_from(*words)
    names = [*([opt.letter] if opt.letter else []), f"--{argument.word}"]
    if argument.word.replace("-", "_") not in (argument.name, f"no_{argument.name}"):
        names.append(argument.name)
    help = argument.lead.replace(" [default: ", "  [default: ")  # as click's own
    return Option(names, title=opt.title, help=help, meanings=argument.meanings, **attributes)


def _type_of(argument: Argument) -> Any:
    kind = argument.type
    if kind in TYPES:
        return TYPES[kind]
    if kind.within:
        return click.FloatRange(*kind.within, min_open=True)
    if kind.choices and not (argument.opt and argument.opt.free):
        return (SomeOf if kind.several else click.Choice)(list(kind.choices))
    return None


def _completions(argument: Argument) -> Sequence[str]:
    """Return words to complete if click's type has none: those of patterns, of the metavar or the choices."""
    opt = argument.opt
    if argument.type == PATTERNS_TYPE:
        return SELECTIONS
    if not opt or not opt.free:
        return ()
    return [word.partition("[")[0] for word in opt.metavar.split("|")] if "|" in opt.metavar else argument.type.choices


def command_of(
    function: Callable[..., Any], text: str, label: str = "", unit: str = "", last: str = "", html: bool = False
) -> Command:
    """Return the command of a function of the library.

    Args:
        text: help below the first paragraph of the function's docstring.
        label, unit, last: of the progress bar, if the function has one.
        html: whether it has --html.
    """
    name, arguments = function.__name__, arguments_of(function)
    parameters = options_for(function)
    if html:
        place = next((i for i, each in enumerate(parameters, 1) if each.name == "dry_run"), len(parameters))
        parameters.insert(place, HTML)
    parameters += [*([SAVE_RECIPE, LOCK] if "out" in arguments else []), *TERMINAL]

    def callback(quiet: bool, verbose: bool, json: bool, html: str | None = None, **options: Any) -> None:
        from .progress import ProgressBar
        from .render import print_report

        with closing(ProgressBar(label, quiet or json, unit, last)) as bar:
            report = run_function(function, options, bar, html)
        status = report.said_no
        print_report(
            name, report, form="json" if json else "text", quiet=quiet, verbose=verbose, html=html, status=status
        )
        if status:
            click.get_current_context().exit(1)

    return make_command(name, function, text, parameters, callback)


def make_command(
    name: str,
    function: Callable[..., Any],
    text: str,
    parameters: Sequence[click.Parameter],
    callback: Callable[..., None],
) -> Command:
    """Return a command whose help is the first paragraph of a function's docstring, and a text.

    If the word of an option is not the name of its argument, that word has an environment variable too.
    """
    for parameter in parameters:
        word = max(parameter.opts, key=len).removeprefix("--").replace("-", "_")
        if isinstance(parameter, click.Option) and word != parameter.name:
            parameter.envvar = f"LORATOOL_{name}_{word}".upper()
    first, _, _ = (inspect.getdoc(function) or "").partition("\n\n")
    return Command(name, params=[*parameters], callback=callback, help=f"{first}\n\n{text}")


def run_function(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    progress: Callable[[int, int], None],
    html: str | None = None,
) -> Any:
    """Call the library's function with click's options, and write the recipe of the call and its lock if requested.

    Args:
        html: the path of the report's page, which must not be that of the output.
    """
    known = arguments_of(function)
    arguments = library_arguments(
        {name: value for name, value in options.items() if name not in ("save_recipe", "lock")}
    )
    given = {**arguments, **({"progress": progress} if "progress" in known else {})}
    if "out" not in known:
        return function(**given)
    from ..commands.run.write import check_recipe_path, recipe_of, write_recipe
    from ..files.output.paths import require_outside

    if html is not None and (opt := known["out"].opt):
        require_outside(Path(html), Path(options["out"] or opt.default.partition(",")[0]))
    place = options["save_recipe"]
    if options["lock"] and place is None:
        raise click.UsageError("--lock needs --save-recipe")
    if place is not None and options.get("in_place"):
        raise click.UsageError("--save-recipe and --in-place exclude each other")
    if place is not None:
        check_recipe_path(Path(place), options["force"], options["dry_run"])
        if (statement := options.get("attest")) and os.path.realpath(statement) == os.path.realpath(place):
            raise UsageError("is the path of the recipe too", culprit=statement, remedy="name another with --attest")
    if options["lock"]:
        from ..commands.run.lock import check_lock_path, lock_path, write_lock
        from ..commands.run.steps import plan_steps

        check_lock_path(lock_path(Path(place)), options["force"])
    report = function(**given)
    if place is not None:
        recipe = recipe_of(function, arguments, report.out)
        write_recipe(Path(place), recipe)
        if options["lock"]:
            write_lock(lock_path(Path(place)), plan_steps(recipe, dry_run=True), progress)
    return report


def library_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return click's options as keyword arguments of the library's function. Options that are not given are left out.

    A flag `no_x` becomes x = False.
    """
    arguments: dict[str, Any] = {}
    for name, value in options.items():
        if value in (None, (), {}):
            continue
        if name.startswith("no_"):
            arguments[name.removeprefix("no_")] = not value
        else:
            arguments[name] = value
    return arguments
