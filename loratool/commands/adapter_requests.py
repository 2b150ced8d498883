"""Parse the adapters of a call: paths with optional weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Annotated, TypeGuard

from ..architectures.components import WEIGHED
from ..errors import UsageError, brief
from .arguments import NUMBER, TEXT, ArgumentType, one_or_several, parse_path

AdapterPath = str | os.PathLike[str]

AdapterArgument = AdapterPath | tuple[AdapterPath, float] | tuple[AdapterPath, float, Mapping[str, float]]

AdapterWeights = Mapping[str, float] | Mapping[Path, float] | Mapping[AdapterPath, float]  # keys are invariant

ADAPTER_FORMS = (
    "a path, (path, weight), (path, weight, {component or pattern: weight}), several of these in a list, or "
    "{path: weight}"
)

# one adapter in a recipe
ADAPTER_SCHEMA = {
    "description": "A path, or a path with a weight, and with weights of components or of modules by pattern.",
    "anyOf": [
        TEXT,
        {
            "type": "object",
            "properties": {
                "path": TEXT,
                "weight": NUMBER,
                "weights": {"type": "object", "additionalProperties": NUMBER},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
    ],
}


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter as the user names it."""

    path: str
    weight: float = 1.0
    module_weights: Mapping[str, float] = field(default_factory=dict)  # by keys of `WEIGHED` and patterns, in order
    drop: tuple[str, ...] = ()  # keys of DROP_CHOICES, the same for all adapters of a command


def _read_adapters(adapters: Adapters) -> Adapters:
    """Return the adapters of a call, an iterator as a list. Raise UsageError where `parse_adapters` does."""
    read = [*adapters] if isinstance(adapters, Iterator) else adapters
    parse_adapters(read)
    return read


ADAPTERS_TYPE = ArgumentType(ADAPTER_FORMS, _read_adapters, one_or_several({"$ref": "#/$defs/adapter"}), several=True)

# not Iterable, which a mapping to anything is too
Adapters = Annotated[
    AdapterArgument | Sequence[AdapterArgument] | Iterator[AdapterArgument] | AdapterWeights, ADAPTERS_TYPE
]


def parse_adapters(adapters: Adapters, drop: Sequence[str] = ()) -> list[AdapterRequest]:
    """Return a request for each adapter that the caller names.

    Args:
        drop: as `AdapterRequest.drop`.

    Raises:
        UsageError: `adapters` has none of the forms in ADAPTER_FORMS, or a weight is not a finite number.
    """
    arguments: Iterable[object]
    if isinstance(adapters, Mapping):
        arguments = adapters.items()
    elif isinstance(adapters, str | os.PathLike) or (
        _is_weighted(adapters) and not isinstance(adapters[1], str | os.PathLike | tuple)  # else a tuple of adapters
    ):
        arguments = [adapters]
    elif isinstance(adapters, Sequence | Set | Iterator) and not isinstance(adapters, bytes):
        arguments = adapters
    else:
        raise _unknown_form(adapters)
    requests = [replace(_parse_one(argument), drop=tuple(drop)) for argument in arguments]
    if not requests:
        raise UsageError("no adapter given")
    return requests


def _is_weighted(argument: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(argument, tuple) and len(argument) in (2, 3)


def _parse_one(argument: object) -> AdapterRequest:
    path, weight, parts = (*argument, {})[:3] if _is_weighted(argument) else (argument, 1.0, {})
    if not isinstance(path, str | os.PathLike) or not isinstance(parts, Mapping):
        raise _unknown_form(argument)
    name = parse_path(path)
    for part in parts:
        if not isinstance(part, str):
            raise UsageError(f"{brief(part)} is neither a pattern nor one of {', '.join(WEIGHED)}", culprit=name)
    return AdapterRequest(name, _weight(weight, name), {part: _weight(value, name) for part, value in parts.items()})


def _weight(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):  # numpy's numbers are Real too
        raise UsageError(
            f"the weight {brief(value)} is not a number", culprit=path, remedy=f"adapters are {ADAPTER_FORMS}"
        )
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not math.isfinite(weight):
        raise UsageError(f"the weight {weight} is not a finite number", culprit=path)
    return weight


def _unknown_form(argument: object) -> UsageError:
    return UsageError(f"{brief(argument)} is not an adapter", remedy=f"adapters are {ADAPTER_FORMS}")
