"""Check the arguments of the library's functions against their annotations, so that a wrong one is named in one line.

`checked` is on every function of `loratool`. Its signature is the one source of what it takes: each annotation has an
`ArgumentType`, which says so in words and reads a value. It hands on the plainest value of the annotation's own type
(of a numpy number Python's, of "5GB" the bytes), and takes that again: commands call the same parsers, which tell a
type checker what is left of a type, and so do the command line's types.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, wraps
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from ..binding.modules.selection import parse_layers, parse_patterns
from ..errors import UsageError, brief
from ..files.hub.names import shareable
from ..views.parts.numbers import plural

P = ParamSpec("P")


R = TypeVar("R")


@dataclass(frozen=True)
class ArgumentType:
    """One type of argument.

    Attributes:
        taken: what it takes, which completes "... is not".
        parse: returns the plainest value that means the same, or raises UsageError.
        choices: the words that it can be, if they are few.
    """

    taken: str
    parse: Callable[[Any], Any]
    choices: tuple[str, ...] = ()


def parse_path(value: object) -> str:
    """Return a path as text, a link to the hub as its name: no report, journal or card has its credentials.

    Raises:
        UsageError: it is none, or one that no file system has.
    """
    try:
        path = os.fspath(value) if isinstance(value, str | os.PathLike) else b""
        names = re.split(rb"[/\\]", os.fsencode(path)) if isinstance(path, str) and "\0" not in path else [b""]
        known = names != [b""]
    except (TypeError, ValueError):  # what it gives is no text, or has half a character
        known = False
    if not known:
        raise _is_not(value, PATH_TAKEN)
    if (longest := max(map(len, names))) > LONGEST_NAME:
        raise UsageError(f"{brief(value)} is too long a name ({longest} bytes)")
    return shareable(str(path))


def parse_text(value: object) -> str:
    """Return a text that is not empty; any other value raises UsageError."""
    if not isinstance(value, str) or not value:
        raise _is_not(value, "a text")
    return str(value)


def parse_whole(value: object) -> int:
    """Return a whole number of any library's type; a bool, a fraction or any other value raises UsageError."""
    return _parse_above(-MOST, value, WHOLE)


def parse_positive(value: object) -> int:
    """Return a whole number above 0; any other value raises UsageError."""
    return _parse_above(0, value, POSITIVE)


def _parse_above(least: int, value: object, taken: str) -> int:
    number = int(value) if isinstance(value, Integral) and not is_flag(value) else MOST
    if not least < number < MOST:
        raise _is_not(value, taken)
    return number


def parse_number(value: object) -> float:
    """Return a finite number of any library's type; a bool or any other value raises UsageError."""
    try:
        number = float(value) if isinstance(value, Real) and not is_flag(value) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _is_not(value, "a finite number")
    return number


def parse_flag(value: object) -> bool:
    """Return a bool, Python's or numpy's; any other value raises UsageError, numbers too."""
    if not is_flag(value):
        raise _is_not(value, "True or False")
    return bool(value)


def is_flag(value: object) -> bool:
    """Return whether a value is a bool, Python's or numpy's."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, bool) or bool(numpy and isinstance(value, numpy.bool_))


def parse_words(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return the words of a list, or the one that is given alone.

    Raises:
        UsageError: it is neither.
    """
    return tuple(_parse_list(parse_text, "a word or a list of words", [value] if isinstance(value, str) else value))


# letters behind a number -> what they multiply it with
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


MOST = 1 << 63


LONGEST_NAME = 255  # bytes of a file's name, on all common file systems


def parse_size(value: float | str | None) -> int | None:
    """Return a size in bytes: `5GB`, `500MB`, `2GiB` or a number of bytes; MB is 10**6, MiB is 2**20.

    Raises:
        UsageError: it is none of these, or not from 1 to below 2^63.
    """
    return None if value is None else _parse_amount(value, SIZE_UNITS, SIZE_TAKEN)


def parse_count(value: float | str | None) -> int | None:
    """Return a count: `20M`, `500K`, `1.5B`, or a number.

    Raises:
        UsageError: it is none of these, or not from 1 to below 2^63.
    """
    return None if value is None else _parse_amount(value, COUNT_UNITS, COUNT_TAKEN)


def _parse_amount(value: object, units: Mapping[str, int], taken: str) -> int:
    amount: Any = 0
    if isinstance(value, str):
        found = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)", value, re.ASCII)
        amount = int(Fraction(found[1]) * units.get(found[2].upper(), 0)) if found else 0
    elif isinstance(value, Real) and not is_flag(value):
        amount = value
    if not 1 <= amount < MOST or amount != int(amount):
        raise _is_not(value, taken)
    return int(amount)


PATH_TAKEN = "a path"


WHOLE = "a whole number below 2^63"


POSITIVE = "a whole number from 1 to 2^63"


SIZE_TAKEN = "a size like 5GB or 500MiB, or a number of bytes"


COUNT_TAKEN = "a count like 20M or 500K"


StrPath = Annotated[str | os.PathLike[str], ArgumentType(PATH_TAKEN, parse_path)]


Patterns = Annotated[str | Sequence[str], ArgumentType("a pattern or a list of patterns", parse_patterns)]


Words = Annotated[str | Sequence[str], ArgumentType("a word or a list of words", parse_words)]


Layers = Annotated[str | Iterable[int], ArgumentType("layers like '0-3,7', a range or a list of numbers", parse_layers)]


Size = Annotated[float | str, ArgumentType(SIZE_TAKEN, parse_size)]


Count = Annotated[float | str, ArgumentType(COUNT_TAKEN, parse_count)]


Positive = Annotated[int, ArgumentType(POSITIVE, parse_positive)]


def one_of(choices: Collection[str], refused: Mapping[str, str] = MappingProxyType({})) -> ArgumentType:
    """Return the type of a word that is one of these, each told once; `refused` has others, each with the reason."""
    words = tuple(dict.fromkeys(choices))

    def parse(value: object) -> str:
        if isinstance(value, str) and value in refused:
            raise UsageError(f"{value} is not offered: {refused[value]}")
        if not isinstance(value, str) or value not in words:
            raise UsageError(f"{brief(value)} is none of {', '.join(words)}")
        return str(value)

    return ArgumentType(f"one of {', '.join(words)}", parse, words)


def words_of(choices: Collection[str]) -> ArgumentType:
    """Return the type of a list of words that are each one of these."""
    each = one_of(choices)

    def parse(value: Any) -> object:
        return tuple(map(each.parse, parse_words(value)))

    return ArgumentType(f"{each.taken}, or several", parse, each.choices)


def dtype_of(choices: Collection[str]) -> ArgumentType:
    """Return the type of a dtype that is one of these, in capitals or with torch's name before it, too."""
    each = one_of(choices)

    def parse(value: object) -> object:
        return each.parse(value.lower().removeprefix("torch.") if isinstance(value, str) else value)

    return ArgumentType(each.taken, parse, each.choices)


@dataclass(frozen=True)
class Call:
    """A call of a function of the library, as its types hand the arguments on.

    Attributes:
        inputs: the arguments that can be given without a name, the output too.
        options: those that are given by name, without the ones that are the defaults.
    """

    command: str
    inputs: Mapping[str, Any]
    options: Mapping[str, Any]


def call_of(command: Callable[..., object], arguments: Mapping[str, Any]) -> Call:
    """Return a call with these arguments, which `read_arguments` has read."""
    parameters, types = inspect.signature(command).parameters, argument_types(command)
    inputs, options = dict[str, Any](), dict[str, Any]()
    for name in [each for each in parameters if each in arguments]:
        default, required = parameters[name].default, parameters[name].default is inspect.Parameter.empty
        if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
            inputs[name] = arguments[name]
        elif required or arguments[name] != (default if default is None else types[name].parse(default)):
            options[name] = arguments[name]
    return Call(command.__name__, inputs, options)


# argument -> the word of its option, where it is another
WORDS = {"from_format": "from", "runtime": "for"}


def option_word(name: str, on: bool = True) -> str:
    """Return the word of an argument's option, without its dashes; `on` is false of what turns a flag off."""
    word = WORDS.get(name, name.replace("_", "-"))
    return word if on else f"no-{word}"


# The call under way: a model card tells all of it, and no function on the way there has a use for it
_CALL: ContextVar[Call] = ContextVar("_CALL")


def current_call() -> Call:
    """Return the call of a function of the library that is being run."""
    return _CALL.get()


def checked(command: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse arguments that are not of its annotations' types.

    Raises:
        UsageError: an argument has another type or an unknown name, or one is missing.
    """

    call: Callable[..., R] = command
    several = _several(command)

    @wraps(command)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        arguments = read_arguments(command, args, keywords)
        outer = _CALL.set(call_of(command, arguments))
        try:
            if several is None:
                return call(**arguments)
            more = arguments.pop(several)
            first = [arguments.pop(name) for name in _unnamed(command)]
            return call(*first, *more, **arguments)
        finally:
            _CALL.reset(outer)

    return run


def read_arguments(
    command: Callable[..., object], args: Sequence[object], keywords: Mapping[str, object]
) -> dict[str, Any]:
    """Return the arguments of a call by name, each as its type hands it on.

    Raises:
        UsageError: as `checked`.
    """
    parameters, name = inspect.signature(command).parameters, command.__name__
    unnamed, several = _unnamed(command), _several(command)
    if len(args) > len(unnamed) and several is None:
        raise UsageError(f"takes {_count(unnamed)} without a name, not {len(args)}", culprit=name)
    given: dict[str, object] = dict(zip(unnamed, args, strict=False))
    for keyword in keywords:
        if keyword not in parameters or keyword == several:
            near = difflib.get_close_matches(keyword, parameters, 1)
            remedy = f"did you mean {near[0]}?" if near else f"its arguments are {', '.join(parameters)}"
            raise UsageError(f"takes no argument {keyword!r}", culprit=name, remedy=remedy)
        if keyword in given:
            raise UsageError(f"the argument {keyword!r} is given twice", culprit=name)
    given |= keywords
    if several is not None:
        given[several] = args[len(unnamed) :]
    if missing := [each for each, of in parameters.items() if of.default is of.empty and each not in given]:
        raise UsageError(f"needs {' and '.join(missing)}", culprit=name)
    return {each: read_value(each, argument_types(command)[each], value) for each, value in given.items()}


def _unnamed(command: Callable[..., object]) -> list[str]:
    """Return the arguments that can be given without a name, one for each."""
    parameters = inspect.signature(command).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


def _several(command: Callable[..., object]) -> str | None:
    """Return the argument that takes all others without a name, if there is one: `*others`."""
    parameters = inspect.signature(command).parameters.values()
    return next((each.name for each in parameters if each.kind is each.VAR_POSITIONAL), None)


def read_value(name: str, kind: ArgumentType, value: object) -> Any:
    """Return a value as its type hands it on; what it raises says the argument's name."""
    try:
        return kind.parse(value)
    except UsageError as error:
        if error.culprit is None:
            error.culprit = error.argument = name
        raise


@cache
def argument_types(command: Callable[..., object]) -> dict[str, ArgumentType]:
    """Return the type of each argument of a function, by its name."""
    found = {name: type_of(annotation) for name, annotation in annotations_of(command).items()}
    several = _several(command)
    return found if several is None else {**found, several: _list_of(found[several])}


def annotations_of(command: Callable[..., object]) -> dict[str, Any]:
    """Return the annotation of each argument of a function, by its name.

    `get_type_hints` would read the report's class too, for which some modules would load torch.
    """
    names = inspect.unwrap(command).__globals__
    written = {name: each.annotation for name, each in inspect.signature(command).parameters.items()}
    return {name: eval(each, names) if isinstance(each, str) else each for name, each in written.items()}


def type_of(annotation: Any) -> ArgumentType:
    """Return the type of an annotation."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind: ArgumentType = annotation.__metadata__[0]
        return kind
    if origin in (Union, UnionType):
        return _any_of([type_of(each) for each in inner])
    if origin is Literal:
        return one_of(inner)
    if origin is tuple:
        return _tuple_of([type_of(each) for each in inner])
    if origin in COMPOUND:
        return COMPOUND[origin](*(type_of(each) for each in inner if origin is not Callable))
    return SIMPLE[annotation]


def _any_of(types: Sequence[ArgumentType]) -> ArgumentType:
    """Return the type of a union, None left out of the words."""
    others = [kind for kind in types if kind is not NONE]

    def parse(value: object) -> object:
        if value is None and NONE in types:
            return None
        if len(others) == 1:
            return others[0].parse(value)
        for kind in others:
            try:
                return kind.parse(value)
            except UsageError:
                continue
        raise _is_not(value, taken)

    taken = " or ".join(kind.taken for kind in others)
    return ArgumentType(taken, parse)


def _list_of(kind: ArgumentType) -> ArgumentType:
    taken = f"a list, each {kind.taken}"
    return ArgumentType(taken, lambda value: _parse_list(kind.parse, taken, value))


def _parse_list(parse: Callable[[object], R], taken: str, value: object) -> tuple[R, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise _is_not(value, taken)
    return tuple(parse(each) for each in value)


def _mapping_of(key: ArgumentType, of: ArgumentType) -> ArgumentType:
    taken = f"a mapping from {key.taken} to {of.taken}"

    def parse(value: object) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise _is_not(value, taken)
        return {key.parse(name): read_value(str(name), of, each) for name, each in value.items()}

    return ArgumentType(taken, parse)


def _tuple_of(types: Sequence[ArgumentType]) -> ArgumentType:
    taken = f"({', '.join(kind.taken for kind in types)})"

    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != len(types):
            raise _is_not(value, taken)
        return tuple(kind.parse(each) for kind, each in zip(types, value, strict=True))

    return ArgumentType(taken, parse)


def _callback() -> ArgumentType:
    taken = "a function of two numbers, those done and all"

    def parse(value: object) -> object:
        try:
            known = callable(value) and not isinstance(value, type) and bool(inspect.signature(value).bind(0, 0))
        except TypeError:  # it takes other arguments
            known = False
        except ValueError:  # one of C, which does not say what it takes
            known = True
        if not known:
            raise _is_not(value, taken)
        return value

    return ArgumentType(taken, parse)


def _parse_none(value: object) -> None:
    if value is not None:
        raise _is_not(value, "None")


NONE = ArgumentType("None", _parse_none)


SIMPLE = {
    str: ArgumentType("a text", parse_text),
    int: ArgumentType(WHOLE, parse_whole),
    float: ArgumentType("a finite number", parse_number),
    bool: ArgumentType("True or False", parse_flag),
    NoneType: NONE,
}


COMPOUND: dict[Any, Callable[..., ArgumentType]] = {Sequence: _list_of, Mapping: _mapping_of, Callable: _callback}


def _is_not(value: object, taken: str) -> UsageError:
    return UsageError(f"{brief(value)} is not {taken}")


def _count(names: Sequence[str]) -> str:
    return f"{plural(len(names), 'argument')} ({', '.join(names)})"
