"""Rebuild a report from its JSON, and check each value against the type of its field.

The culprit of an error is the place of the value: `modules[3].rank`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...errors import InputError, brief

Reader = Callable[[Any], Any]  # returns what a value of JSON stands for

MOST = 1 << 63  # above all counts

MOST_NUMBER = 1 << 1000  # above all whole numbers that stand for a float

OTHER_VERSION = "read it with the loratool that wrote it, or write it again with this one"


def rebuild(classes: Sequence[type], value: object) -> Any:
    """Return the dataclass for `value`, an object with its fields as JSON has them.

    Args:
        classes: the candidates; the one with the nearest names of fields is taken.

    Raises:
        InputError: a field is unknown or missing, or a value is not of its field's type.
    """
    names = set(value) if isinstance(value, dict) else set()
    return _read_object(min(classes, key=lambda kind: len({each.name for each in fields(kind)} ^ names)), value)


def read_at(reader: Reader, step: str | int, value: object) -> Any:
    """Read a value. Errors get its place: `step` is the name of a field or the index of an item."""
    try:
        return reader(value)
    except InputError as error:
        here, inner = f"[{step}]" if isinstance(step, int) else step, error.culprit or ""
        error.culprit = f"{here}.{inner}" if inner and not inner.startswith("[") else f"{here}{inner}"
        raise


def read_items(reader: Reader, value: object) -> tuple[Any, ...]:
    """Read each item of a list."""
    return tuple([read_at(reader, i, each) for i, each in enumerate(_items(value))])


def _read_object(kind: type, value: object) -> Any:
    readers = _field_readers(kind)
    if not isinstance(value, dict):
        raise _misfit(value, "an object")
    if lacking := [name for name in readers if name not in value]:
        raise InputError(f"is missing {lacking[0]}, which every {kind.__name__} has", remedy=OTHER_VERSION)
    if unknown := [name for name in value if name not in readers]:
        raise InputError(f"has an unknown key {brief(unknown[0])} for a {kind.__name__}", remedy=OTHER_VERSION)
    return kind(**{name: read_at(readers[name], name, value[name]) for name in readers})


@cache
def _field_readers(kind: type) -> Mapping[str, Reader]:
    hints = get_type_hints(kind)
    return {
        # what tells a command's reports apart is the same in all of a class
        field.name: partial(_read_constant, field.default)
        if field.name == "kind" and field.default is not MISSING
        else _reader(hints[field.name])
        for field in fields(kind)
    }


@cache
def _reader(hint: Any) -> Reader:
    """Return the reader of a type."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return partial(_read_plain, *PLAIN[hint])
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return partial(_read_object, hint)
    if origin in (Union, types.UnionType):
        return partial(_read_either, [_reader(part) for part in sorted(parts, key=lambda part: part is not NoneType)])
    if origin is tuple and parts[1:] == (...,):
        return partial(read_items, _reader(parts[0]))
    if origin is tuple:
        return partial(_read_tuple, [_reader(part) for part in parts])
    assert isinstance(origin, type) and issubclass(origin, Mapping), f"{hint} is in no report"
    return partial(_read_mapping, parts[0] is int, _reader(parts[1]))


NoneType = type(None)


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < MOST_NUMBER)


# type -> whether a value is of it, and what it is called
PLAIN: dict[object, tuple[Callable[[Any], bool], str]] = {
    str: (lambda value: type(value) is str, "a text"),
    bool: (lambda value: type(value) is bool, "true or false"),
    int: (lambda value: type(value) is int and 0 <= value < MOST, "a whole number from 0 to 2^63"),
    float: (_is_number, "a number"),
    NoneType: (lambda value: value is None, "null"),
    Any: (lambda _: True, "anything"),
}


def _read_plain(fits: Callable[[Any], bool], called: str, value: object) -> object:
    if not fits(value):
        raise _misfit(value, called)
    return value


def _read_constant(constant: object, value: object) -> object:
    return _read_plain(lambda each: each == constant, repr(constant), value)


def _read_either(readers: Sequence[Reader], value: object) -> Any:
    for reader in readers[:-1]:
        try:
            return reader(value)
        except InputError:
            continue
    return readers[-1](value)


def _read_tuple(readers: Sequence[Reader], value: object) -> tuple[Any, ...]:
    items = _items(value)
    if len(items) != len(readers):
        raise InputError(f"is a list of {len(items)}, not of {len(readers)}", remedy=OTHER_VERSION)
    return tuple(map(read_at, readers, range(len(items)), items))


def _read_mapping(is_numbered: bool, reader: Reader, value: object) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _misfit(value, "an object")
    return {_key(name) if is_numbered else name: read_at(reader, f"[{name!r}]", each) for name, each in value.items()}


def _key(name: str) -> int:
    number = int(name) if name.isdecimal() and len(name) <= len(str(MOST)) else MOST
    if number >= MOST or str(number) != name:
        raise InputError(f"has the key {brief(name)}, not a whole number", remedy=OTHER_VERSION)
    return number


def _items(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise _misfit(value, "a list")
    return value


def _misfit(value: object, called: str) -> InputError:
    return InputError(f"is {brief(value)}, not {called}", remedy=OTHER_VERSION)
