"""The JSON Schema of recipes, built from the arguments of commands and their help."""

from __future__ import annotations

from typing import Any

from ...commands.adapter_requests import ADAPTER_SCHEMA
from ...commands.run.steps import COMMANDS, arguments_by_word, function_for


def make_recipe() -> dict[str, Any]:
    """Return the schema of a recipe for `loratool run`, in JSON or in YAML."""
    steps = [{"$ref": f"#/$defs/{command}"} for command in COMMANDS]
    listed = {"type": "array", "items": {"oneOf": steps}, "minItems": 1}
    several = {"type": "object", "properties": {"steps": listed}, "required": ["steps"], "additionalProperties": False}
    definitions = {"adapter": ADAPTER_SCHEMA, **{command: _step(command) for command in COMMANDS}}
    return {"oneOf": [*steps, several], "$defs": definitions}


def _step(command: str) -> dict[str, Any]:
    """Return the schema of a step: exactly the words of a command."""
    properties: dict[str, Any] = {"command": {"const": command}}
    required = ["command"]
    for word, argument in arguments_by_word(function_for(command)).items():
        opt = argument.opt
        help = {"description": argument.help} if opt and opt.title else {}
        properties[word] = {**help, **argument.type.schema}
        if argument.name == "out" or argument.required:
            required.append(word)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
