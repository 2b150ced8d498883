"""Respell options and commands in a text, such as an error's, as the arguments and calls of Python.

All texts are written in the words of the command line: `--force`, `--dtype fp32`, `loratool unmerge MERGED`. Who calls
the library reads `force=True`, `dtype="fp32"`, `loratool.unmerge(MERGED)`. The table is the arguments of the functions.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from ..errors import UsageError
from .adapter_requests import ADAPTERS_TYPE
from .arguments import SIMPLE, Argument, arguments_of

# command and an option of it -> the function that it calls with that option
FUNCTIONS = {
    ("convert", "set"): "edit_metadata",
    ("convert", "unset"): "edit_metadata",
    ("diff", "headers"): "diff_headers",
    ("diff", "spectra"): "diff_spectra",
    ("inspect", "for"): "inspect_for",
    ("inspect", "spectra"): "spectra",
    ("verify", "attestation"): "verify_attestation",
}

# options that the command line alone has -> what stands for them in Python
TERMINAL = {
    "html": "write_report",
    "json": "json",
    "save-recipe": "save_recipe",
    "spectra": "spectra",
    "strict": "strict",
}

# a word of a shell, up to a blank or the punctuation of a sentence
_WORD = r"(?:'[^']*'|[^\s'`(),;:]|[,:;](?=\S))+"

_COMMAND = re.compile(rf"\bloratool ([a-z]+)\b((?: {_WORD})*)")

_NEXT = re.compile(rf" ?({_WORD})")

_OPTION = re.compile(r"(?<![\w-])(?:--[a-z][a-z-]*|-o)\b(?!-)")


def respelled(text: str, flags: str = "") -> str:
    """Return a text with its options and commands as Python has them.

    Args:
        flags: a part of it that is options and their values alone.
    """
    text = _COMMAND.sub(_call, text)
    for (command, option), name in FUNCTIONS.items():
        text = re.sub(rf"\b{command} --{option}\b", name, text)
    if flags:
        text = text.replace(flags, _without_options(flags, is_prose=False))
    return _without_options(text)


def _without_options(text: str, is_prose: bool = True) -> str:
    parts, end = list[str](), 0
    while option := _OPTION.search(text, end):
        given, behind = _read(text[option.start() :], {}, is_prose=is_prose)
        shown = ", ".join(_shown_each(given))
        before, end = text[end : option.start()], len(text) - len(behind)
        if not given:  # it is none of ours, or a letter follows that is in no word
            found = _find(option[0], {})
            shown = found[0].name if found else TERMINAL.get(option[0].removeprefix("--"), option[0])
            end = option.end()
        parts += [before, shown]
    return "".join(parts) + text[end:]


@cache
def _functions() -> dict[str, Mapping[str, Argument]]:
    """Return the arguments of the library's functions, by name."""
    library = import_module(__package__.partition(".")[0])
    functions = {name: getattr(library, name) for name in library.__all__ if name.islower()}
    return {name: arguments_of(each) for name, each in functions.items() if hasattr(each, "arguments")}


@cache
def _by_word() -> dict[str, list[Argument]]:
    """Return the arguments that an option sets, of all functions."""
    table: dict[str, list[Argument]] = {}
    for arguments in _functions().values():
        for argument in arguments.values():
            table.setdefault(argument.word, []).append(argument)
    return table


def _find(option: str, arguments: Mapping[str, Argument]) -> list[Argument]:
    """Return the arguments that an option sets, those of one function if it has it."""
    word = "out" if option == "-o" else option.removeprefix("--")
    return [each for each in arguments.values() if each.word == word] or _by_word().get(word, [])


def _call(match: re.Match[str]) -> str:
    """Return a call in the place of a command, and the words behind it."""
    command, functions = match[1], _functions()
    if command not in functions:
        return match[0]
    options = re.findall(r"--([a-z-]+)", match[2])
    name = next((FUNCTIONS[command, each] for each in options if (command, each) in FUNCTIONS), command)
    places = [each for each in functions[command].values() if not each.named and not (each.opt and each.opt.title)]
    given, behind = _read(match[2], functions[name], places)
    if not given:
        return f"loratool.{name}{behind}"
    by_place = [each for each, argument in functions[name].items() if not argument.named]
    values = [_one(given.pop(each, ["..."])) for each in by_place if each in given or functions[name][each].required]
    return f"loratool.{name}({', '.join([*values, *_shown_each(given)])}){behind}"


def _read(
    text: str, arguments: Mapping[str, Argument], places: Sequence[Argument] = (), is_prose: bool = False
) -> tuple[dict[str, list[str]], str]:
    """Return the arguments of a command line, with their values as Python has them, and the text behind it.

    Args:
        places: the arguments that it has by position.
        is_prose: whether the word behind an option can be one of the sentence.
    """
    given, positional, at = dict[str, list[str]](), list[str](), 0
    most = 99 if any(map(_is_several, places)) else len(places)
    while following := _NEXT.match(text, at):
        option, _, value = following[1].partition("=")
        found = _find(option, arguments) if option.startswith("-") else []
        if not found and (
            is_prose if option.startswith("-") else len(positional) == most or (given and not _is_marked(following[1]))
        ):
            break
        at = following.end()
        if found and found[0].type is SIMPLE[bool]:
            given[found[0].name] = [str(found[0].default is not True)]
        elif found:
            behind = None if value else _NEXT.match(text, at)
            if behind and not behind[1].startswith("-") and (not is_prose or _is_value(found, behind[1])):
                value, at = behind[1], behind.end()
            given.setdefault(found[0].name, []).extend([_value(found, value)] if value else [])
        elif not option.startswith("-"):
            positional.append(following[1])
    for number, argument in enumerate(places):
        count = max(1, len(positional) - (len(places) - number - 1)) if _is_several(argument) else 1
        if positional:
            given[argument.name] = [_value([argument], word) for word in positional[:count]]
        positional = positional[count:]
    return given, text[at:]


def _is_several(argument: Argument) -> bool:
    return argument.type.several or argument.type is ADAPTERS_TYPE


def _shown_each(given: Mapping[str, list[str]]) -> list[str]:
    """Return arguments as a call has them, and the name alone of one without a value."""
    return [f"{name}={_one(values)}" if values else name for name, values in given.items()]


def _one(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"


def _is_value(arguments: Sequence[Argument], word: str) -> bool:
    """Return whether the word behind an option is its value, and not the next one of the sentence."""
    return _is_marked(word) or any(word in _known(each) for each in arguments)


def _is_marked(word: str) -> bool:
    """Return whether a word is no word of a sentence."""
    return re.fullmatch(r"[a-z-]+", word) is None


def _known(argument: Argument) -> Sequence[str]:
    """Return the words that an argument takes."""
    metavar = argument.opt.metavar if argument.opt else ""
    return argument.type.choices or metavar.split("|")


def _value(arguments: Sequence[Argument], word: str) -> str:
    """Return Python's text of a value on the command line. What stands for any value is a name, such as BASE."""
    if placeholder := re.fullmatch(r"([A-Z][A-Z0-9_]*)?(\.{2,3})?", word):
        return placeholder[1] or "..."
    with suppress(ValueError):  # a quote without end, of a name that was truncated
        word = "".join(shlex.split(word))
    for read in READERS:
        for argument in arguments:
            with suppress(ValueError, UsageError):
                value = read(word)
                argument.type.parse(value)
                return _shown(value)
    return _shown(word)


def _shown(value: object) -> str:
    """Return a value as Python's text, with the quotes that formatters write."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_shown(key)}: {_shown(each)}' for key, each in value.items())}}}"
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else repr(value)


def _weighted(word: str) -> tuple[str, float]:
    name, _, number = word.rpartition(":" if ":" in word else "=")
    return name, float(number)


def _mapping(word: str) -> dict[str, Any]:
    name, _, value = word.rpartition("=")
    return {name: int(value) if value.isdecimal() else value}


def _flags(word: str) -> tuple[bool, ...]:
    return tuple(bool(int(each)) for each in word.split(","))


# what a word of the command line can be in Python, the first that its argument takes
READERS: tuple[Callable[[str], Any], ...] = (int, float, _weighted, _mapping, _flags)
