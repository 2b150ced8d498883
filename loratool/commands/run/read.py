"""Read a recipe's file, YAML, JSON or TOML, as plain values. Nothing in it is run, and repeated keys are refused.

YAML is read by the rules of version 1.2, where `no` is a word, 1e-3 a number and 0-15 a text. A few aliases can expand
to more values than memory holds, so the values are counted before they are built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...durable.fileio import open_for_reading
from ...errors import InputError, MachineError, UsageError, install_remedy
from ...files.hub.cache import NO_SUCH

if TYPE_CHECKING:
    from yaml import Node

YAML_ENDINGS = (".yaml", ".yml")

ENDINGS = (*YAML_ENDINGS, ".json")

TOML_ENDING = ".toml"  # of mlrecipe's, which are read and not written

LARGEST = 1 << 20  # bytes of a file

LARGEST_TOML, MOST_DOTS = 1 << 16, 100  # of characters, and in a line, as the time that keys with dots take grows fast

LONGEST = 20  # digits of a whole number

MOST_VALUES = 10_000  # in a file, aliases counted as what they stand for

TOO_MANY = f"it has more than {MOST_VALUES:,} values"

TAG = "tag:yaml.org,2002:"

# The core schema of YAML 1.2: tag -> (how a plain value looks, its first letters); all others are texts
SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe's file. Its ending decides between YAML, JSON and TOML.

    Raises:
        UsageError: it has another ending.
        InputError: it is not valid, or not a mapping, or too large.
        MachineError: it is YAML or TOML, and what reads that is not installed.
    """
    parse = PARSERS.get(path.suffix.lower())
    if parse is None:
        remedy = "see loratool guide recipes"
        raise UsageError("a recipe's file ends in .yaml or .json", culprit=str(path), remedy=remedy)
    if not path.exists():
        raise InputError(NO_SUCH, culprit=str(path))
    return _read_mapping(path, LARGEST, "recipe", parse)


def read_json(path: Path, largest: int, what: str) -> dict[str, Any]:
    """Read a mapping in JSON of at most `largest` bytes by the rules of recipes. Raise InputError if it is none."""
    return _read_mapping(path, largest, what, _parse_json)


def _read_mapping(path: Path, largest: int, what: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    with open_for_reading(path) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise InputError(f"is larger than {largest:,} bytes, so it is not a {what}", culprit=str(path))
    try:
        value = parse(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        fault = "is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise InputError(f"cannot be read: {fault}", culprit=str(path)) from error
    if not isinstance(value, dict):
        raise InputError("is not a mapping of keys to values", culprit=str(path))
    return value


def _parse_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number in JSON")

    return json.loads(text, object_pairs_hook=_unique, parse_constant=refuse, parse_int=_whole)


def _whole(digits: str) -> int:
    if len(digits) > LONGEST:
        raise ValueError(f"{digits[:LONGEST]}... is too large a number")
    return int(digits)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} is not a string: quote it")
        if key in mapping:
            raise ValueError(f"the key {key!r} occurs twice")
        mapping[key] = value
    return mapping


def _parse_toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # before Python 3.11
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ImportError as error:
            what = "TOML needs Python 3.11, or tomli, which is not installed"
            raise MachineError(what, remedy=install_remedy("recipes")) from error
    if len(text) > LARGEST_TOML or any(line.count(".") > MOST_DOTS for line in text.splitlines()):
        raise ValueError(f"it has more than {LARGEST_TOML:,} characters, or {MOST_DOTS} dots in a line")
    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MachineError("YAML needs PyYAML, which is not installed", remedy=install_remedy("recipes")) from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """A loader that stops at too many values, as reading them takes long."""

        count = 0

        def compose_node(self, parent: Node | None, index: int) -> Node | None:
            self.count += 1
            if self.count > MOST_VALUES:
                raise ValueError(TOO_MANY)
            return super().compose_node(parent, index)

    try:
        loader = Loader(text)
        loader.yaml_implicit_resolvers = yaml_resolvers()
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    if node is None:
        return None
    if _count(node, {}) > MOST_VALUES:
        raise ValueError(TOO_MANY)
    return _value(node)


def yaml_resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Return the core schema as PyYAML takes it: the first letter of a plain value -> tags, each with its pattern."""
    resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (pattern, first) in SCALARS.items():
        for letter in first:
            resolvers.setdefault(letter, []).append((TAG + tag, re.compile(f"(?:{pattern})$")))
    return resolvers


def _inner(node: Node) -> list[Node]:
    """Return the nodes in a list or a mapping, with a mapping's keys."""
    if isinstance(node.value, str):
        return []
    return [each for item in node.value for each in (item if isinstance(item, tuple) else (item,))]


def _count(node: Node, counts: dict[int, int]) -> int:
    """Return how many values a node expands to. `counts` caches nodes; 0 marks a node that is being counted."""
    if id(node) not in counts:
        counts[id(node)] = 0
        counts[id(node)] = 1 + sum(_count(each, counts) for each in _inner(node))
    elif not counts[id(node)]:
        raise ValueError("an alias contains itself")
    return counts[id(node)]


def _value(node: Node) -> Any:
    """Return the plain value of a node, with aliases resolved."""
    kind = node.tag.removeprefix(TAG)
    if kind == "map" and not isinstance(node.value, str):
        return _unique([(_value(key), _value(value)) for key, value in node.value])
    if kind == "seq" and not isinstance(node.value, str):
        return [_value(each) for each in node.value]
    if kind not in PLAIN or not isinstance(node.value, str):
        raise ValueError(f"{node.tag} is not supported in a recipe")
    return PLAIN[kind](node.value)


# tag of a plain value -> what makes it of its text
PLAIN: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": _whole,
    "float": float,
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
}

# ending of a recipe's file -> what parses its text
PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(YAML_ENDINGS, _parse_yaml),
    ".json": _parse_json,
    TOML_ENDING: _parse_toml,
}
