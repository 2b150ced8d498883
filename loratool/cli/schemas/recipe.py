"""Make the JSON Schema of recipes, of the commands' own arguments; the help of an option says what it is."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import Parameter, signature
from typing import Annotated, Any, Union, get_args, get_origin

import click

from ...commands.arguments import Count, Layers, Patterns, Positive, Size, StrPath, Words, annotations_of
from ...commands.inputs import Adapters
from ...commands.run.steps import COMMANDS, function_of, option_words

TEXT: dict[str, Any] = {"type": "string", "minLength": 1}

NUMBER: dict[str, Any] = {"type": "number"}

AMOUNT: dict[str, Any] = {"type": ["string", "number"]}

ADAPTER: dict[str, Any] = {
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


def one_or_several(each: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a value that may stand alone or in a list."""
    return {"anyOf": [each, {"type": "array", "items": each, "minItems": 1}]}


# (type of an argument, its schema)
NAMED: tuple[tuple[Any, dict[str, Any]], ...] = (
    (StrPath, TEXT),
    (Patterns, one_or_several(TEXT)),
    (Words, one_or_several(TEXT)),
    (Layers, {"anyOf": [TEXT, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}]}),
    (Size, AMOUNT),
    (Count, AMOUNT),
    (Positive, {"type": "integer", "minimum": 1}),
    (Adapters, one_or_several({"$ref": "#/$defs/adapter"})),
    (bool, {"type": "boolean"}),
    (int, {"type": "integer"}),
    (float, NUMBER),
    (str, TEXT),
)


def make_recipe() -> dict[str, Any]:
    """Make the schema of what `loratool run` reads, from JSON or from YAML."""
    steps = [{"$ref": f"#/$defs/{command}"} for command in COMMANDS]
    listed = {"type": "array", "items": {"oneOf": steps}, "minItems": 1}
    several = {"type": "object", "properties": {"steps": listed}, "required": ["steps"], "additionalProperties": False}
    definitions = {"adapter": ADAPTER, **{command: _step(command) for command in COMMANDS}}
    return {"oneOf": [*steps, several], "$defs": definitions}


def _step(command: str) -> dict[str, Any]:
    """Make the schema of a step: all words of a command, and no other."""
    function = function_of(command)
    parameters, annotations, helps = signature(function).parameters, annotations_of(function), _helps(command)
    properties: dict[str, Any] = {"command": {"const": command}}
    required = ["command"]
    for word, name in option_words(function).items():
        properties[word] = {**({"description": helps[word]} if word in helps else {}), **_typed(annotations[name])}
        if name == "out" or parameters[name].default is Parameter.empty:
            required.append(word)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _helps(command: str) -> dict[str, str]:
    """Return the help of a command's options by their words."""
    options: click.Command = getattr(import_module(f"...{command}", __name__), command)
    named = [each for each in options.params if isinstance(each, click.Option) and each.help]
    return {max(each.opts, key=len).removeprefix("--"): " ".join(str(each.help).split()) for each in named}


def _typed(annotation: Any) -> dict[str, Any]:
    """Make the schema of the values that an annotation takes; None is left out, as a word that is not given is."""
    for known, schema in NAMED:
        if annotation == known:
            return schema
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words = {"enum": list(annotation.__metadata__[0].choices)}
        return words if inner[0] is str else one_or_several(words)
    if origin in (Union, types.UnionType):
        each = [_typed(part) for part in inner if part is not types.NoneType]
        return each[0] if len(each) == 1 else {"anyOf": each}
    if origin is tuple:
        each = [_typed(part) for part in inner]
        return {"type": "array", "prefixItems": each, "minItems": len(each), "items": False}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": _typed(inner[1])}
    assert origin is Sequence, f"{annotation} has no schema"
    return {"type": "array", "items": _typed(inner[0])}
