"""Write the recipe of a call. Running it makes the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ...durable.fileio import write_at
from ...durable.partial import partial_file
from ...errors import LoratoolError, MachineError, NeedsFlag, UsageError, install_remedy, shell_word
from ...files.hub.names import shareable
from ...files.output.output import naming_output
from ...files.output.paths import check_place
from ..adapter_requests import ADAPTERS_TYPE, parse_adapters
from ..arguments import PATH_TYPE, PATHS_TYPE, Argument, arguments_of, changed, parse_paths, read_arguments
from .read import ENDINGS, YAML_ENDINGS, read_recipe, yaml_resolvers
from .steps import OF_THE_RUN

OTHER = "choose another file with --save-recipe"

BREAKS = frozenset("\x85\u2028\u2029")  # line breaks to YAML, which PyYAML writes as they are


def recipe_of(function: Callable[..., Any], arguments: Mapping[str, Any], out: str | None) -> dict[str, Any]:
    """Return a call as a recipe: all options that are not the default, by word.

    Args:
        arguments: by the function's keywords.
        out: the output of the call; None if it has none.
    """
    known = arguments_of(function)
    values = read_arguments(function, (), arguments)
    unnamed = {name for name, each in known.items() if not each.named}
    names = [name for name in (*unnamed, *changed(function, values)) if name in values and name not in OF_THE_RUN]
    values = {**{name: arguments[name] for name in names}, "out": out}
    return {
        "command": function.__name__,
        **{each.word: _plain(each, values[name]) for name, each in known.items() if values.get(name) not in (None, {})},
    }


def _plain(argument: Argument, value: Any) -> Any:
    """Return a value of a call for YAML and JSON."""
    if argument.type == ADAPTERS_TYPE:
        return [_adapter(shareable(each.path), each.weight, each.module_weights) for each in parse_adapters(value)]
    if argument.type == PATH_TYPE:
        return shareable(os.fspath(value))
    if argument.type == PATHS_TYPE:
        return [*map(shareable, parse_paths(value))]
    if argument.default is True:
        return not value
    return _listed(value)


def _listed(value: Any) -> Any:
    return [*map(_listed, value)] if isinstance(value, tuple) else value


def _adapter(path: str, weight: float, weights: Mapping[str, float]) -> str | dict[str, Any]:
    if weight == 1 and not weights:
        return path
    return {"path": path, "weight": weight, **({"weights": dict(weights)} if weights else {})}


def check_recipe_path(path: Path, force: bool, dry_run: bool) -> None:
    """Refuse a path for a recipe, before the call runs.

    Raises:
        UsageError: it has another ending, cannot be written, or is another file, or nothing is written.
        NeedsFlag: it exists.
        MachineError: PyYAML is not installed.
    """
    if path.suffix.lower() not in ENDINGS:
        remedy = f"name it {shell_word((path.stem or 'recipe') + '.json')}"
        raise UsageError("a recipe's file ends in .yaml or .json", culprit=str(path), remedy=remedy)
    if dry_run:
        raise UsageError("a dry run writes no recipe", culprit=str(path), remedy="remove --dry-run")
    check_place(path, True, remedy=OTHER)
    if path.exists() and not _is_recipe(path):
        raise UsageError("is not a recipe, so it is not replaced", culprit=str(path), remedy=OTHER)
    if path.exists() and not force:
        raise NeedsFlag("exists already", culprit=str(path), flags="--force", why="to replace it")
    encode(path, {})


def _is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe, and not, for example, an input's config.json that --force would replace."""
    try:
        return not read_recipe(path).keys().isdisjoint({"command", "steps"})
    except LoratoolError:
        return False


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Write a recipe as YAML or JSON, by the ending of its file."""
    with naming_output(path), partial_file(path) as file:
        write_at(file, memoryview(encode(path, recipe)), 0)


def encode(path: Path, recipe: Mapping[str, Any]) -> bytes:
    """Return the bytes of a recipe's file. Raise MachineError if PyYAML is needed and not installed."""
    if path.suffix.lower() not in YAML_ENDINGS:
        text = json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
        return text.encode(errors="backslashreplace")  # half a character, of a path that is no UTF-8, as JSON has it
    try:
        import yaml
    except ImportError as error:
        raise MachineError("YAML needs PyYAML, which is not installed", remedy=install_remedy("recipes")) from error
    stream, is_read_back = StringIO(), BREAKS.isdisjoint(json.dumps(recipe, ensure_ascii=False))
    layout = {"sort_keys": False, "width": float("inf"), "default_flow_style": False, "allow_unicode": is_read_back}
    dumper = yaml.SafeDumper(stream, **layout)
    core_resolvers, others = (
        yaml_resolvers(),
        yaml.SafeDumper.yaml_implicit_resolvers,
    )  # quoted if it is no text to either
    dumper.yaml_implicit_resolvers = {
        each: [*core_resolvers.get(each, ()), *others.get(each, ())] for each in {*core_resolvers, *others}
    }
    dumper.open()
    dumper.represent(dict(recipe))
    dumper.close()
    return stream.getvalue().encode()
