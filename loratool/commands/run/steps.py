"""Parse a recipe into checked steps: commands with their arguments, inputs and outputs, in order.

A step is a command with the words of its options, without dashes: `max-shard-size: 5GB`, `no-undo: true`. Paths are as
on the command line: relative ones start at the working folder. A step can read the output of an earlier one by the same
path, before that exists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from ...binding.merge.choices import TOKENIZERS
from ...errors import InputError, LoratoolError, NeedsFlag, UsageError, brief
from ...files.hub.cache import resolve
from ...files.output.paths import WEIGHTS, check_place
from ..adapter_requests import ADAPTERS_TYPE, parse_adapters
from ..arguments import PATH_TYPE, PATHS_TYPE, Argument, arguments_of, parse_paths, read_arguments
from ..calls import output_elsewhere

# a command that a step can be -> its module beside this folder
COMMANDS = {
    "merge": "merge.call",
    "unmerge": "unmerge.call",
    "verify": "verify.call",
    "extract": "extract.call",
    "init": "init.call",
    "resize": "resize.call",
    "combine": "combine.call",
    "convert": "convert.command",
    "patch": "patch.call",
    "apply": "apply.call",
}

OF_THE_RUN = ("dry_run", "progress", "workers")  # keywords that no step has

NO_WEIGHTS = ("imatrix", "tokenizer", "undo")  # keywords of paths that are read, and are neither model nor adapter

WRITTEN = ("out", "residual", "attest")  # keywords of paths that are written; all other paths are read

LONGEST_SHOWN = 60  # letters of a word in a message

ADAPTER_WORDS = ("path", "weight", "weights")


@dataclass(frozen=True)
class Step:
    """A command with its arguments, checked as far as possible without opening files.

    Attributes:
        number: counted from 1.
        arguments: by the keywords of `function`.
        others: those of `reads` that are neither a model nor an adapter.
        made: those of `reads` that earlier steps write.
        waits_for: these steps.
    """

    number: int
    command: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    others: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    waits_for: tuple[int, ...] = ()


def function_for(command: str) -> Callable[..., Any]:
    """Return the library's function of a command of COMMANDS."""
    function: Callable[..., Any] = getattr(import_module(f"..{COMMANDS[command]}", __package__), command)
    return function


def arguments_by_word(function: Callable[..., Any]) -> dict[str, Argument]:
    """Return the arguments of a command by word."""
    return {each.word: each for name, each in arguments_of(function).items() if name not in OF_THE_RUN}


def plan_steps(recipe: Mapping[str, Any], force: bool = False, dry_run: bool = False) -> tuple[Step, ...]:
    """Return the steps of a recipe, after all checks that are possible before the first step runs.

    Args:
        force: whether existing outputs may be replaced.
        dry_run: whether nothing will be written, so that outputs may exist.

    Raises:
        UsageError: a word or a value is wrong, or outputs and inputs contradict each other.
        InputError: an input does not exist, and no earlier step writes it.
        NeedsFlag: an output exists.
    """
    steps: list[Step] = []
    listed, places = _steps_in(recipe), _Places()
    for number, values in enumerate(listed, 1):
        with _in_step(number if len(listed) > 1 else None):
            step = read_step(number, values, force)
            writers = {path: found for path in step.reads if (found := places.writers(path))}
            places.add(step, dry_run)
            earlier = sorted({number for found in writers.values() for number in found})
            steps.append(replace(step, made=tuple(writers), waits_for=tuple(earlier)))
    for step in steps:
        with _in_step(step.number if len(listed) > 1 else None):
            _check_inputs(step, places)
    return tuple(steps)


@contextmanager
def _in_step(number: int | None) -> Iterator[None]:
    """Add the number of the step to errors, if there are several steps."""
    try:
        yield
    except LoratoolError as error:
        where = [f"step {number}"] if number else []
        error.culprit = ", ".join([*where, *([error.culprit] if error.culprit else [])]) or None
        raise


def _steps_in(recipe: Mapping[str, Any]) -> Sequence[Any]:
    """Return a recipe's steps: the list `steps`, or the recipe itself as the only step."""
    if "steps" not in recipe:
        return [recipe]
    steps, others = recipe["steps"], recipe.keys() - {"steps"}
    if others:
        raise UsageError("is beside steps; a recipe has one step, or only the key steps", culprit=min(others))
    if not isinstance(steps, list) or not steps:
        raise UsageError("is not a list of steps", culprit="steps")
    return steps


def read_step(number: int, values: Any, force: bool = False) -> Step:
    """Return a step without looking at its files. Raise UsageError for a wrong word or value."""
    if not isinstance(values, Mapping):
        raise UsageError("is not a mapping of keys to values")
    command = values.get("command")
    if not isinstance(command, str) or command not in COMMANDS:
        raise _unknown(command, COMMANDS, "command", "commands")
    function = function_for(command)
    words, arguments = arguments_by_word(function), dict[str, Any]()
    for word, value in values.items():
        if word == "command":
            continue
        if word not in words:
            raise _unknown(word, words, f"key of {command}", "keys")
        arguments[words[word].name] = _read_value(word, words[word], value)
    known = arguments_of(function)
    if arguments.get("in_place"):
        message = f"{command} in place is no step of a recipe, whose outputs are made again from inputs that stay"
        raise UsageError(message, remedy="write out: PATH in the place of in-place")
    if "out" in known and arguments.get("out") is None:
        raise UsageError(f"{command} needs an output", remedy="add out: PATH")
    if force and "force" in known:
        arguments["force"] = True
    try:
        arguments = read_arguments(function, (), arguments)
    except UsageError as error:
        error.culprit = next((word for word, each in words.items() if each.name == error.culprit), error.culprit)
        raise
    paths = {name: value for name, value in arguments.items() if value is not None and known[name].type == PATH_TYPE}
    no_paths = {("tokenizer", word) for word in TOKENIZERS}
    reads = [path for name, path in paths.items() if name not in WRITTEN and (name, path) not in no_paths]
    adapters = [value for name, value in arguments.items() if value and known[name].type == ADAPTERS_TYPE]
    reads += [each.path for value in adapters for each in parse_adapters(value)]
    writes = [path for name, path in paths.items() if name in WRITTEN]
    others = [path for path in reads if any(paths.get(name) == path for name in NO_WEIGHTS)]
    patches = [
        path for name, value in arguments.items() if known[name].type == PATHS_TYPE for path in parse_paths(value)
    ]
    return Step(number, command, function, arguments, (*reads, *patches), tuple(writes), tuple(others))


def _unknown(word: object, known: Iterable[str], what: str, several: str) -> UsageError:
    text = str(word)[:LONGEST_SHOWN]
    near = get_close_matches(text.replace("_", "-"), known, 1)
    remedy = f"did you mean {near[0]}?" if near else f"its {several} are {', '.join(known)}"
    return UsageError(f"is not a {what}", culprit=text, remedy=remedy) if word else UsageError(f"needs a {what}")


def _read_value(word: str, argument: Argument, value: Any) -> Any:
    """Return a value of a recipe as the library takes it."""
    if argument.type == ADAPTERS_TYPE:
        return [_read_adapter(each) for each in (value if isinstance(value, list) else [value])]
    if argument.default is True:
        if not isinstance(value, bool):
            raise UsageError(f"{brief(value)} is not true or false", culprit=word)
        return not value
    return value


def _read_adapter(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    for word in value:
        if word not in ADAPTER_WORDS:
            raise _unknown(word, ADAPTER_WORDS, "key of an adapter", "keys")
    if "path" not in value:
        raise UsageError("an adapter needs a path", culprit="adapters")
    return value["path"], value.get("weight", 1.0), value.get("weights", {})


@dataclass
class _Places:
    """The paths that steps write and read, with links resolved -> the number of the step, the last one that reads."""

    written: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)

    def writers(self, path: str) -> list[int]:
        """Return the steps that write `path`, or a folder around it."""
        place = Path(os.path.realpath(path))
        return [self.written[str(each)] for each in (place, *place.parents) if str(each) in self.written]

    def add(self, step: Step, dry_run: bool) -> None:
        """Add a step. Refuse its output if another step writes it, or if it exists, by the paths."""
        self.read.update((os.path.realpath(path), step.number) for path in step.reads)
        for path in step.writes:
            place = Path(os.path.realpath(path))
            if str(place) in self.written:
                raise UsageError(f"is already the output of step {self.written[str(place)]}", culprit=path)
            number = self.read.get(str(place))
            if number == step.number or (number and is_taken(place)):
                reader = "this step" if number == step.number else f"step {number}"
                raise UsageError(f"is an input of {reader}, and would be overwritten", culprit=path)
            if not self.writers(str(place.parent)) and not output_elsewhere(path):
                is_patch = step.command == "patch" and "to" not in step.arguments
                is_file = is_patch or place.suffix in (*WEIGHTS, ".json")
                check_place(Path(path), is_file, remedy="choose another output with out: PATH")
            if is_taken(place) and not step.arguments.get("force") and not dry_run:
                remedy = "add --force to replace all outputs that exist"
                raise NeedsFlag("exists already", culprit=path, remedy=remedy)
        self.written.update((os.path.realpath(path), step.number) for path in step.writes)


def is_taken(place: Path) -> bool:
    """Return whether an output's path exists. An empty folder does not count."""
    return place.exists() and not (place.is_dir() and not any(place.iterdir()))


def _check_inputs(step: Step, places: _Places) -> None:
    """Raise InputError for an input that does not exist and that no earlier step writes."""
    for path in step.reads:
        writers = places.writers(path)
        if any(number < step.number for number in writers):
            continue
        try:
            resolve(path)
        except InputError as error:
            if writers:
                raise UsageError(f"is written by step {min(writers)}, which runs later", culprit=path) from error
            raise
