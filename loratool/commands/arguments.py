"""Check the arguments of the library's functions against their annotations, and name a wrong one in one line.

The annotations are the only definition of a function's arguments. `arguments_of` reads them for the checks, the
options of the command line, the words of recipes and their schema. Each argument has an `ArgumentType`, which describes
and parses its values. Parsing returns a plain value of the annotation's type (a Python number for numpy's, bytes for
"5GB"), and accepts that value again. Commands call the same parsers, so that a type checker knows the narrowed types.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache, wraps
from numbers import Integral, Real
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin

from ..binding.modules.selection import parse_layers, parse_patterns
from ..errors import UsageError, brief
from ..files.hub.names import shareable
from ..files.stores.links import ShownLink
from ..views.parts.numbers import plural

P = ParamSpec("P")

R = TypeVar("R")


@dataclass(frozen=True)
class ArgumentType:
    """One type of argument.

    Attributes:
        taken: the accepted values in words, which complete "... is not".
        parse: returns a plain value with the same meaning, or raises UsageError.
        schema: the JSON Schema of its values in a recipe.
        choices: the accepted words, if they are few.
        several: whether it takes one or a list of them.
        within: limits on the command line: numbers above the first, up to the second. The library may have more.
        meanings: of the choices, if their table has them.
    """

    taken: str
    parse: Callable[[Any], Any]
    schema: Mapping[str, Any] = field(default_factory=dict, compare=False)
    choices: tuple[str, ...] = ()
    several: bool = False
    within: tuple[float, float] | None = None
    meanings: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Opt:
    """An argument on the command line: an option under a title, or without a title a positional argument."""

    title: str = ""  # of the help
    metavar: str = ""
    default: str = ""  # in words, where it is not a value
    letter: str = ""
    text: str = ""  # what the argument means, where the docstring does not say it
    meanings: Mapping[str, str] = field(default_factory=dict, compare=False)  # of words, where the type has none
    free: bool = False  # wrong words are refused by the library, with a reason
    commas: bool = False  # a value is several, with commas between


@dataclass(frozen=True)
class Argument:
    """An argument of a function.

    Attributes:
        type: of its values other than None; for *others that of each.
        default: the class `empty` of inspect.Parameter, if it has none.
        kind: of inspect.Parameter.
        nullable: whether None is taken too.
        opt: None if the command line does not have it.
        text: its meaning: a line below `Args:` or that of Opt, with {meanings} where those of its words go.
    """

    name: str
    type: ArgumentType
    default: Any
    kind: Any
    nullable: bool = False
    opt: Opt | None = None
    text: str = ""

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def named(self) -> bool:
        """Whether the argument is given by name only."""
        return self.kind is inspect.Parameter.KEYWORD_ONLY

    @property
    def help(self) -> str:
        """The meaning, with those of its words, and the default if that has words."""
        meanings = "; ".join(f"{word}: {meaning}" for word, meaning in self.meanings.items())
        return self._with_default(self.text.replace("{meanings}", meanings))

    @property
    def lead(self) -> str:
        """The help without the meanings of its words."""
        return self._with_default(self.text.replace("{meanings}.", "").replace("  ", " ").strip())

    @property
    def meanings(self) -> Mapping[str, str]:
        """Words that it takes -> what they mean, if its text tells."""
        told = (self.opt and self.opt.meanings) or self.type.meanings
        return told if "{meanings}" in self.text else {}

    def _with_default(self, text: str) -> str:
        return f"{text} [default: {self.opt.default}]" if self.opt and self.opt.default else text

    @property
    def word(self) -> str:
        """The word of its option, without the dashes. A flag that is on by default begins with `no-`."""
        return option_word(self.name, self.default is not True)


def parse_path(value: object) -> str:
    """Return a path as text, and a link to the hub as its name, so that no report, journal or card has its credentials.

    Raises:
        UsageError: it is no path, or one that no file system has.
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
        raise UsageError(f"{brief(value)} has a name of {longest} bytes; the limit is {LONGEST_NAME}")
    return path if isinstance(path, ShownLink) else shareable(str(path))


def parse_text(value: object) -> str:
    """Return a text that is not empty. Raise UsageError for any other value."""
    if not isinstance(value, str) or not value:
        raise _is_not(value, "a text")
    return str(value)


def parse_whole(value: object) -> int:
    """Return a whole number of any library's type. Raise UsageError for a bool, a fraction or any other value."""
    return _parse_above(-MOST, value, WHOLE)


def parse_positive(value: object) -> int:
    """Return a whole number above 0. Raise UsageError for any other value."""
    return _parse_above(0, value, POSITIVE)


def _parse_above(least: int, value: object, taken: str) -> int:
    number = int(value) if isinstance(value, Integral) and not is_flag(value) else MOST
    if not least < number < MOST:
        raise _is_not(value, taken)
    return number


def parse_number(value: object) -> float:
    """Return a finite number of any library's type. Raise UsageError for a bool or any other value."""
    try:
        number = float(value) if isinstance(value, Real) and not is_flag(value) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _is_not(value, "a finite number")
    return number


def parse_flag(value: object) -> bool:
    """Return a bool, Python's or numpy's. Raise UsageError for any other value, also for numbers."""
    if not is_flag(value):
        raise _is_not(value, "True or False")
    return bool(value)


def is_flag(value: object) -> bool:
    """Return whether a value is a bool, Python's or numpy's."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, bool) or bool(numpy and isinstance(value, numpy.bool_))


def parse_words(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return the words of a list. A single word may stand without a list.

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
        match = re.fullmatch(r"(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]*)", value, re.ASCII)
        amount = int(Fraction(match[1]) * units.get(match[2].upper(), 0)) if match else 0
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

TEXT = {"type": "string", "minLength": 1}

NUMBER = {"type": "number"}

AMOUNT = {"type": ["string", "number"]}


def one_or_several(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of one value or a list of values."""
    return {"anyOf": [schema, {"type": "array", "items": schema, "minItems": 1}]}


LAYERS = {"anyOf": [TEXT, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}]}

PATH_TYPE = ArgumentType(PATH_TAKEN, parse_path, TEXT)

PATTERNS_TYPE = ArgumentType("a pattern or a list of patterns", parse_patterns, one_or_several(TEXT), several=True)

SIZE_TYPE = ArgumentType(SIZE_TAKEN, parse_size, AMOUNT)

COUNT_TYPE = ArgumentType(COUNT_TAKEN, parse_count, AMOUNT)

POSITIVE_TYPE = ArgumentType(POSITIVE, parse_positive, {"type": "integer", "minimum": 1})

StrPath = Annotated[str | os.PathLike[str], PATH_TYPE]

Patterns = Annotated[str | Sequence[str], PATTERNS_TYPE]

WORDS_TYPE = ArgumentType("a word or a list of words", parse_words, one_or_several(TEXT), several=True)

Words = Annotated[str | Sequence[str], WORDS_TYPE]


def parse_paths(value: object) -> tuple[str, ...]:
    """Return the paths of a list. A single path may stand without a list.

    Raises:
        UsageError: it is neither, or the list is empty.
    """
    paths = [value] if isinstance(value, str | os.PathLike) else value
    return tuple(_parse_list(parse_path, PATHS_TAKEN, paths))


PATHS_TAKEN = "a path or a list of paths"

PATHS_TYPE = ArgumentType(PATHS_TAKEN, parse_paths, one_or_several(TEXT), several=True)

Paths = Annotated[str | os.PathLike[str] | Sequence[str | os.PathLike[str]], PATHS_TYPE]

Layers = Annotated[
    str | Iterable[int], ArgumentType("layers like '0-3,7', a range or a list of numbers", parse_layers, LAYERS)
]

Size = Annotated[float | str, SIZE_TYPE]

ParameterCount = Annotated[float | str, COUNT_TYPE]

Positive = Annotated[int, POSITIVE_TYPE]

Share = Annotated[float, ArgumentType("a finite number", parse_number, NUMBER, within=(0, 1))]


def one_of(choices: Collection[str], refused: Mapping[str, str] = MappingProxyType({})) -> ArgumentType:
    """Return the type of a word that is one of these choices. `refused` has other words, each with a reason."""
    words = tuple(dict.fromkeys(choices))

    def parse(value: object) -> str:
        if isinstance(value, str) and value in refused:
            raise UsageError(f"{value} is not supported: {refused[value]}")
        if not isinstance(value, str) or value not in words:
            raise UsageError(f"{brief(value)} is none of {', '.join(words)}")
        return str(value)

    meanings = choices if isinstance(choices, Mapping) else {}
    return ArgumentType(f"one of {', '.join(words)}", parse, {"enum": [*words]}, words, meanings=meanings)


def words_of(choices: Collection[str]) -> ArgumentType:
    """Return the type of a list of words, each one of these choices."""
    word_type = one_of(choices)

    def parse(value: Any) -> object:
        return tuple(map(word_type.parse, parse_words(value)))

    taken = f"{word_type.taken}, or several"
    return replace(word_type, taken=taken, parse=parse, schema=one_or_several(word_type.schema), several=True)


class Dtype(Protocol):
    """A dtype of torch or numpy."""

    @property
    def itemsize(self) -> int: ...


AnyDtype = Dtype | type[object]  # numpy's and ml_dtypes' scalars are classes

# names of torch and numpy -> the words of options
DTYPE_WORDS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def dtype_word(value: object) -> str:
    """Return the name of a dtype in small letters: of torch's, numpy's and ml_dtypes', or of a text. Else it is empty.

    Python's float is none, as its name would be taken for torch's, which is float32.
    """
    if not isinstance(value, str):
        value = str(getattr(value, "__name__", value)) if hasattr(value, "itemsize") else ""
    return value.lower().removeprefix("torch.")


def dtype_of(choices: Collection[str]) -> ArgumentType:
    """Return the type of a dtype that is one of these choices, as a word or as a dtype of torch or numpy."""
    word_type = one_of(choices)

    def parse(value: object) -> object:
        word = dtype_word(value)
        return word_type.parse(word if word in choices else DTYPE_WORDS.get(word, value))

    return replace(word_type, parse=parse)


# argument -> the word of its option, where it is another
WORDS = {"from_format": "from", "runtime": "for"}


def option_word(name: str, on: bool = True) -> str:
    """Return the word of an argument's option, without its dashes. `on` is False for the word that turns a flag off."""
    word = WORDS.get(name, name.replace("_", "-"))
    return word if on else f"no-{word}"


def checked(command: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function so that it refuses arguments that are not of its annotations' types.

    Raises:
        UsageError: an argument has another type or an unknown name, or one is missing.
    """

    call: Callable[..., R] = command

    @wraps(command)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        return call(**read_arguments(command, args, keywords))

    return run


def read_arguments(
    command: Callable[..., object], args: Sequence[object], keywords: Mapping[str, object]
) -> dict[str, Any]:
    """Return the arguments of a call by name, parsed by their types.

    Raises:
        UsageError: as `checked`.
    """
    arguments, name = arguments_of(command), command.__name__
    unnamed = [each.name for each in arguments.values() if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    several = rest_of(arguments)
    if len(args) > len(unnamed) and several is None:
        raise UsageError(f"takes {_count(unnamed)} by position, not {len(args)}", culprit=name)
    given: dict[str, object] = dict(zip(unnamed, args, strict=False))
    for keyword in keywords:
        if keyword not in arguments or keyword == several:
            near = difflib.get_close_matches(keyword, arguments, 1)
            remedy = f"did you mean {near[0]}?" if near else f"its arguments are {', '.join(arguments)}"
            raise UsageError(f"takes no argument {keyword!r}", culprit=name, remedy=remedy)
        if keyword in given:
            raise UsageError(f"the argument {keyword!r} is given twice", culprit=name)
    given |= keywords
    if several is not None:
        given[several] = args[len(unnamed) :]
    if missing := [each.name for each in arguments.values() if each.required and each.name not in given]:
        raise UsageError(f"needs {' and '.join(missing)}", culprit=name)
    return {each: read_argument(arguments[each], value) for each, value in given.items()}


def changed(command: Callable[..., object], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of named arguments, without defaults."""
    explicit: dict[str, Any] = {}
    for name, argument in arguments_of(command).items():
        if argument.named and name in values:
            default = None if argument.required or argument.default is None else argument.type.parse(argument.default)
            if argument.required or values[name] != default:
                explicit[name] = values[name]
    return explicit


def rest_of(arguments: Mapping[str, Argument]) -> str | None:
    """Return the argument that takes all further positional values, if there is one: `*others`."""
    return next((name for name, each in arguments.items() if each.kind is inspect.Parameter.VAR_POSITIONAL), None)


def read_argument(argument: Argument, value: Any) -> Any:
    """Return a value of an argument, parsed by its type. None is returned if the argument accepts it."""
    if argument.kind is inspect.Parameter.VAR_POSITIONAL:
        return tuple(read_value(argument.name, argument.type, each) for each in value)
    return None if value is None and argument.nullable else read_value(argument.name, argument.type, value)


def read_value(name: str, kind: ArgumentType, value: object) -> Any:
    """Return a value, parsed by its type. Errors get the name of the argument."""
    try:
        return kind.parse(value)
    except UsageError as error:
        if error.culprit is None:
            error.culprit = error.argument = name
        raise


def arguments_of(command: Callable[..., object]) -> Mapping[str, Argument]:
    """Return the arguments of a function of the library, or of a class of calls, by name."""
    command = inspect.unwrap(command)
    return getattr(command, "arguments", None) or _read_signature(command)


@cache
def _read_signature(command: Callable[..., object]) -> dict[str, Argument]:
    """Read the arguments of a function or a class from its annotations, and their meanings from its docstring.

    `get_type_hints` would evaluate the report's class too, and load torch for some modules.
    """
    names = vars(sys.modules[command.__module__])
    sentences = _sentences(inspect.getdoc(command) or "")
    arguments: dict[str, Argument] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        annotation = (
            eval(parameter.annotation, names) if isinstance(parameter.annotation, str) else parameter.annotation
        )
        kind = type_of(annotation)
        marks = annotation.__metadata__ if get_origin(annotation) is Annotated else ()
        opt = next((mark for mark in reversed(marks) if isinstance(mark, Opt)), None)
        text = sentences.get(name) or (opt.text if opt else "")
        text = text.replace("{words}", ", ".join(kind.choices))
        default = () if parameter.kind is parameter.VAR_POSITIONAL else parameter.default
        arguments[name] = Argument(name, kind, default, parameter.kind, _takes_none(annotation), opt, text)
    return arguments


def _sentences(text: str) -> dict[str, str]:
    """Return the text of each argument below `Args:` of a docstring."""
    section = text.partition("\nArgs:\n")[2].partition("\n\n")[0]
    _, *parts = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in zip(parts[::2], parts[1::2], strict=True)}


def _takes_none(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _takes_none(get_args(annotation)[0])
    return get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation)


@cache
def type_of(annotation: Any) -> ArgumentType:
    """Return the type of an annotation, without None."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kinds = [mark for mark in annotation.__metadata__ if isinstance(mark, ArgumentType)]
        return kinds[0] if kinds else type_of(inner[0])
    if origin in (Union, UnionType):
        types = [type_of(each) for each in inner if each is not NoneType]
        return types[0] if len(types) == 1 else _any_of(types)
    if origin is Literal:
        return one_of(inner)
    if origin is tuple:
        return _tuple_of([type_of(each) for each in inner])
    if origin in COMPOUND:
        return COMPOUND[origin](*(type_of(each) for each in inner if origin is not Callable))
    return SIMPLE[annotation]


def _any_of(types: Sequence[ArgumentType]) -> ArgumentType:
    """Return the type of a union."""

    def parse(value: object) -> object:
        for kind in types:
            try:
                return kind.parse(value)
            except UsageError:
                continue
        raise _is_not(value, taken)

    taken = " or ".join(kind.taken for kind in types)
    return ArgumentType(taken, parse, {"anyOf": [kind.schema for kind in types]})


def _list_of(kind: ArgumentType) -> ArgumentType:
    taken = f"a list, each {kind.taken}"
    schema = {"type": "array", "items": kind.schema}
    return ArgumentType(taken, lambda value: _parse_list(kind.parse, taken, value), schema)


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

    return ArgumentType(taken, parse, {"type": "object", "additionalProperties": of.schema})


def _tuple_of(types: Sequence[ArgumentType]) -> ArgumentType:
    taken = f"({', '.join(kind.taken for kind in types)})"

    def parse(value: object) -> tuple[Any, ...]:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != len(types):
            raise _is_not(value, taken)
        return tuple(kind.parse(item) for kind, item in zip(types, value, strict=True))

    schemas = [kind.schema for kind in types]
    schema = {"type": "array", "prefixItems": schemas, "minItems": len(schemas), "items": False}
    return ArgumentType(taken, parse, schema)


def _callback() -> ArgumentType:
    taken = "a function of two numbers, (done, total)"

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


SIMPLE = {
    str: ArgumentType("a text", parse_text, TEXT),
    int: ArgumentType(WHOLE, parse_whole, {"type": "integer"}),
    float: ArgumentType("a finite number", parse_number, NUMBER),
    bool: ArgumentType("True or False", parse_flag, {"type": "boolean"}),
}

COMPOUND: dict[Any, Callable[..., ArgumentType]] = {Sequence: _list_of, Mapping: _mapping_of, Callable: _callback}


def _is_not(value: object, taken: str) -> UsageError:
    return UsageError(f"{brief(value)} is not {taken}")


def _count(names: Sequence[str]) -> str:
    return f"{plural(len(names), 'argument')} ({', '.join(names)})"
