"""Messages on stderr: one form for errors, warnings and hints.

    error: WHERE: WHAT
    hint: REMEDY

A terminal gets the text wrapped at words and truncated after a few lines. A pipe gets full lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import click

from ..commands.machine import VARIABLES
from ..errors import DEBUG, UsageError, is_debugging, without_credentials
from ..views.parts.document import Line, TextSpan, line, text_of
from ..views.parts.writing import command_line
from .surface import Surface, inert, surface_of

if TYPE_CHECKING:
    from ..errors import LoratoolError


MAX_LINES = 6  # of an error and its hint on a terminal

HINT_LINES = 3  # of them the hint's: a command must be whole to be of use

MAX_WARNINGS = 6  # lines

MISSPELT = 0.8  # likeness, by difflib, of a variable's name and one that is read; INSPEKT_JSON has 0.92, BASE 0.62


def print_error(error: LoratoolError, speaker: str = "") -> None:
    """Print an error: the speaker if that is not clear, where, what, and the remedy."""
    err = surface_of(sys.stderr)
    hint = _cut(err, err.wrap(line(TextSpan("hint: ", "faint"), error.remedy)), HINT_LINES) if error.remedy else []
    first, *others = error.what
    what = [line(TextSpan(f"{speaker}error: ", "bad"), first), *map(line, others)]
    err.print([*_cut(err, [each for spans in what for each in err.wrap(spans)], MAX_LINES - len(hint)), *hint])


def print_hint(err: Surface, hint: str) -> None:
    """Print a hint: a command or an option to use next."""
    err.print(err.wrap(line(TextSpan("hint: ", "faint"), hint)))


def show_traceback() -> None:
    """Print the traceback of the current error, if requested."""
    if is_debugging():
        import traceback

        print(inert(without_credentials(traceback.format_exc())), end="", file=sys.stderr)


def warning_line(text: str) -> Line:
    return line(TextSpan("warning: ", "attention"), text)


def warn(warnings: Sequence[str]) -> None:
    """Print warnings, with --json too: readers of stderr may not read the JSON."""
    err = surface_of(sys.stderr)
    err.print([each for text in warnings for each in err.wrap(warning_line(text))])


def _cut(err: Surface, lines: list[Line], most: int) -> list[Line]:
    """Return the first lines; the last says if there are more. A pipe gets all."""
    if err.width is None or len(lines) <= most:
        return lines
    words = text_of(lines[most - 1])
    while len(words) + len(" ...") > err.width:
        words = words.rpartition(" ")[0]
    return [*lines[: most - 1], line(f"{words} ...")]


def usage_error(error: click.ClickException, command: str | None, commands: Iterable[str]) -> UsageError:
    """Return the error of a call of `command` that click cannot parse. `commands` are all commands."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    help_call = f"loratool {command} -h" if command else "loratool -h"
    if isinstance(error, click.exceptions.NoSuchCommand):
        return UsageError(f"no command {error.command_name!r}", remedy=_instead_of(error.command_name, commands))
    if isinstance(error, click.NoSuchOption):
        options = [word for each in context.command.params for word in each.opts] if context else []
        words = {word.lstrip("-"): word for word in options}
        near = get_close_matches(error.option_name.lstrip("-"), words, 1)
        all_options = help_call.replace("-h", "--help")
        remedy = f"{words[near[0]]}; all options: {all_options}" if near else all_options
        return UsageError(f"no option {error.option_name!r}", remedy=remedy)
    if isinstance(error, click.MissingParameter):
        return UsageError(f"no {_spelled(error.param)} given", culprit=command, remedy=help_call)
    if isinstance(error, click.BadParameter) and error.param:
        return UsageError(_in_a_line(error.message), culprit=_spelled(error.param), remedy=help_call)
    return UsageError(_in_a_line(error.format_message()), culprit=command, remedy=help_call)


def variables_of(command: str, option: click.Parameter) -> list[str]:
    """Return the environment variables that set an option of a command, as click reads them."""
    if not isinstance(option, click.Option):
        return []
    variables = [option.envvar] if isinstance(option.envvar, str) else []
    automatic = [f"LORATOOL_{command.upper()}_{str(option.name).upper()}"] if option.allow_from_autoenv else []
    return [*variables, *automatic]


def check_settings(names: Iterable[str], commands: Iterable[str], load: Callable[[str], click.Command]) -> list[str]:
    """Return a warning for each variable that sets no option and has the name of none, as a script's own.

    Args:
        names: of environment variables that begin with LORATOOL_.
        commands: all commands.
        load: imports and returns a command.

    Raises:
        UsageError: a variable is named for a command, or nearly as one that is read, but is not read.
    """
    warnings = []
    for name in sorted(names):
        named = [command for command in commands if name.startswith(f"LORATOOL_{command.upper()}_")]
        options = [(command, option) for command in named or commands for option in load(command).params]
        known = [*(each for pair in options for each in variables_of(*pair)), DEBUG, *VARIABLES]
        if name in known:
            continue
        prefix = f"LORATOOL_{named[0].upper()}_" if named else "LORATOOL_"
        word, words = name.removeprefix(prefix), [each.removeprefix(prefix) for each in known]
        near = get_close_matches(word, words, 1)
        meant = f"did you mean {prefix}{near[0]}?" if near else ""
        if named or get_close_matches(word, words, 1, MISSPELT):
            remedy = meant or f"unset it; all options: loratool {named[0]} --help"
            raise UsageError("sets no option", culprit=name, remedy=remedy)
        warnings.append(f"{name} sets no option{meant and f'; {meant}'}")
    return warnings


def spell_argument(error: UsageError, command: click.Command) -> None:
    """Replace the argument of the library's function in an error by the option of the command line."""
    for parameter in command.params:
        if parameter.name == error.argument and error.culprit == error.argument:
            error.culprit = _spelled(parameter)
            error.remedy = error.remedy or f"loratool {command.name} -h"


def _instead_of(word: str, commands: Iterable[str]) -> str:
    """Return the call that a user meant whose first word is no command."""
    if os.path.exists(word) or os.path.splitext(word)[1] or "/" in word or os.sep in word:
        return command_line("inspect", word)
    near = get_close_matches(word, commands, 1)
    return f"loratool {near[0]} -h" if near else "loratool -h"


def _spelled(parameter: click.Parameter | None) -> str:
    """Return an option as users write it, or an argument as the help names it."""
    if isinstance(parameter, click.Argument):
        return parameter.make_metavar(click.Context(click.Command(None))).removesuffix("...")
    return max(parameter.opts, key=len) if parameter else "value"


def _in_a_line(text: str) -> str:
    text = " ".join(text.split()).removesuffix(".")
    return text[:1].lower() + text[1:]
