"""Lock a recipe: record the digests of what its steps read and write, and hold later runs against the record.

The lock of `NAME.json` is `NAME.lock.json` beside it. It has no date and no place of the machine, and its keys are
sorted, so that the same inputs make the same bytes everywhere. A path has `digest` (of a model or an adapter, as
`files.digest` defines it), `file` (the sha256 of any other file) or `files` (of those of a tokenizer); where they exist
`config` (the sha256 of the config beside the weights) and `revision` (the commit of a name on the hub).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...durable.fileio import sha256_file, write_at
from ...durable.partial import partial_file
from ...errors import InputError, LoratoolError, NeedsFlag, UsageError, brief, shell_word
from ...files.checkpoint import is_config_alone
from ...files.folder.side_files import find_tokenizer, is_patch
from ...files.hub.cache import NO_SUCH, cached_commit, resolve
from ...files.output.output import naming_output
from ...files.output.paths import check_place
from ...numerics.merge import ARITHMETIC_VERSION
from ...streaming.parallel import Progress
from ..digests import config_of_path, digest_of_path
from .read import read_json
from .steps import Step
from .write import recipe_of

FORMAT = 1  # of the lock's file

LARGEST = 1 << 24  # bytes of a lock

KEYS = ("arithmetic", "lock", "loratool", "recipe", "steps")

SHA256 = re.compile(r"sha256:[0-9a-f]{64}")

COMMIT = re.compile(r"[0-9a-f]{7,64}")

# key of a path's record -> its name in messages
FACTS = {
    "revision": "commit",
    "config": "sha256 of its config",
    "digest": "digest",
    "file": "sha256",
    "files": "sha256 of its files",
}

CONTENT = ("digest", "file", "files")  # a record has one of them; a config.json without weights none

SHOWN = 12  # digits of a hash in messages

Record = Mapping[str, str]  # a path's facts, by the keys of FACTS

StepRecord = dict[str, dict[str, Record]]  # "inputs" and "outputs" -> path -> its record


def lock_path(recipe: Path) -> Path:
    """Return the path of a recipe's lock."""
    return recipe.with_name(f"{recipe.stem}.lock.json")


def check_lock_path(place: Path, force: bool) -> None:
    """Refuse a path for a new lock, before any work.

    Raises:
        UsageError: it cannot be written, or is another file.
        NeedsFlag: it exists.
    """
    check_place(place, True, remedy="rename the recipe")
    if place.exists() and not _is_lock(place):
        raise UsageError("is not a lock, so it is not replaced", culprit=str(place), remedy="rename the recipe")
    if place.exists() and not force:
        raise NeedsFlag("exists already", culprit=str(place), flags="--force", why="to replace it")


def _is_lock(place: Path) -> bool:
    try:
        return read_json(place, LARGEST, "lock").keys() == {*KEYS}
    except LoratoolError:
        return False


class Lock(ABC):
    """What a run does with the digests of what its steps read and write.

    Attributes:
        place: the lock's file.
        differs: what is not as recorded, in words; None if nothing is.
    """

    def __init__(self, place: Path, steps: Sequence[Step]) -> None:
        self.place = place
        self.differs: str | None = None
        self._steps = steps
        self._found: dict[str, Record] = {}  # path with links resolved -> its record

    @abstractmethod
    def before_all(self, progress: Progress | None) -> None:
        """Check the inputs that exist before the first step."""

    @abstractmethod
    def before(self, step: Step) -> None:
        """Check the inputs of a step that earlier steps have written."""

    @abstractmethod
    def after(self, step: Step, progress: Progress | None) -> None:
        """Record or check what a step has read and written."""

    @abstractmethod
    def end(self) -> None:
        """Write the lock, after the last step."""


class NewLock(Lock):
    """A lock to write: the digests are recorded, and nothing is checked."""

    def __init__(self, place: Path, steps: Sequence[Step]) -> None:
        super().__init__(place, steps)
        self._records: list[StepRecord] = [{"inputs": {}, "outputs": {}} for _ in steps]

    def before_all(self, progress: Progress | None) -> None:
        pass

    def before(self, step: Step) -> None:
        pass

    def after(self, step: Step, progress: Progress | None) -> None:
        for side, paths in (("inputs", step.reads), ("outputs", step.writes)):
            for path in paths:
                place = os.path.realpath(path)
                if place not in self._found:
                    self._found[place] = dict(facts_of(step, path, progress))
                self._records[step.number - 1][side][path] = self._found[place]

    def end(self) -> None:
        steps = [{"command": step.command, **record} for step, record in zip(self._steps, self._records, strict=True)]
        lock = {
            "arithmetic": ARITHMETIC_VERSION,
            "lock": FORMAT,
            "loratool": version("loratool"),
            "recipe": meaning_of(self._steps),
            "steps": steps,
        }
        data = (json.dumps(lock, indent=2, sort_keys=True) + "\n").encode()
        with naming_output(self.place), partial_file(self.place) as file:
            write_at(file, memoryview(data), 0)


def write_lock(place: Path, steps: Sequence[Step], progress: Progress | None) -> None:
    """Write the lock of steps that have run."""
    lock = NewLock(place, steps)
    for step in steps:
        lock.after(step, progress)
    lock.end()


class HeldLock(Lock):
    """A lock that is there: what is read and written is held against it.

    Raises:
        InputError: there is no lock, or it is damaged, of another recipe or of another arithmetic.
    """

    def __init__(self, place: Path, steps: Sequence[Step], recipe: str) -> None:
        super().__init__(place, steps)
        self._records = read_lock(place, steps, recipe)

    def before_all(self, progress: Progress | None) -> None:
        for step in self._steps:
            self._check(step, "inputs", [path for path in step.reads if path not in step.made], progress)

    def before(self, step: Step) -> None:
        self._check(step, "inputs", step.made, None)

    def after(self, step: Step, progress: Progress | None) -> None:
        self._check(step, "outputs", step.writes, progress)

    def end(self) -> None:
        pass

    def _check(self, step: Step, side: str, paths: Sequence[str], progress: Progress | None) -> None:
        """Set `differs` at the first fact that is not as recorded, and look no further."""
        for path in paths:
            if self.differs is not None:
                return
            recorded, found = self._records[step.number - 1][side][path], dict[str, str]()
            place = os.path.realpath(path)
            facts = self._found[place].items() if place in self._found else facts_of(step, path, progress)
            for key, value in facts:
                found[key] = value
                if value != recorded.get(key):
                    break
            if fact := next((key for key in FACTS if found.get(key) != recorded.get(key)), None):
                of = step.command if len(self._steps) == 1 else f"step {step.number}, {step.command}"
                self.differs = differing(
                    path, f"{side[:-1]} of {of}", self.place, FACTS[fact], recorded.get(fact), found.get(fact)
                )
            self._found[place] = found


def differing(path: str, of: str, place: Path, fact: str, recorded: str | None, found: str | None) -> str:
    """Return the message on a path that is not what a file records."""
    was, now = ((value or "none").removeprefix("sha256:")[:SHOWN] for value in (recorded, found))
    return f"{path}, {of}, is not what {place} records: {fact} {was}, found {now}"


def facts_of(step: Step, path: str, progress: Progress | None = None) -> Iterator[tuple[str, str]]:
    """Yield the facts of a path that a step reads or writes, by the keys of FACTS, the cheap ones first."""
    if commit := cached_commit(path):
        yield "revision", commit
    place = resolve(path)
    if is_patch(place):
        yield "file", f"sha256:{sha256_file(place)}"
        return
    if path in step.others:
        if place.is_file():
            yield "file", f"sha256:{sha256_file(place)}"
        else:
            lines = sorted(f"{name}\t{sha256_file(file)}\n" for name, file in find_tokenizer(place).items())
            yield "files", f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"
        return
    if is_config_alone(path):
        yield "config", f"sha256:{sha256_file(place / 'config.json' if place.is_dir() else place)}"
        return
    is_file = path in step.writes and not place.is_dir()  # a config beside it is not its own
    if not is_file and (config := config_of_path(path)):
        yield "config", f"sha256:{sha256_file(config)}"
    yield "digest", f"sha256:{digest_of_path(path, progress)}"


def meaning_of(steps: Sequence[Step]) -> str:
    """Return the sha256 of a recipe's steps, the same for all spellings of it, in JSON or YAML."""
    recipes = []
    for step in steps:
        arguments = {name: value for name, value in step.arguments.items() if name not in ("force", "out")}
        recipes.append(recipe_of(step.function, arguments, step.arguments.get("out")))
    return f"sha256:{hashlib.sha256(json.dumps(recipes, sort_keys=True).encode()).hexdigest()}"


def read_lock(place: Path, steps: Sequence[Step], recipe: str) -> list[StepRecord]:
    """Read a lock, and return the records of each step. All of it is checked: its recipe's paths, and no other.

    Raises:
        InputError: there is none, or it is damaged, of another recipe or of another arithmetic.
    """
    again = f"loratool run {shell_word(recipe)} --lock"
    if not place.exists():
        raise InputError(NO_SUCH, culprit=str(place), remedy=f"write it: {again}")
    value = read_json(place, LARGEST, "lock")
    try:
        return _records_in(value, steps)
    except InputError as error:
        error.culprit = str(place)
        error.remedy = f"if that is right, write the lock again: {again} --force"
        raise


def _records_in(value: Mapping[str, Any], steps: Sequence[Step]) -> list[StepRecord]:
    _require_keys(value, KEYS, "the lock")
    if not _is_whole(value["lock"]) or value["lock"] != FORMAT:
        raise InputError(f"is a lock of version {brief(value['lock'])}, and this loratool reads {FORMAT}")
    if not _is_whole(value["arithmetic"]) or not isinstance(value["loratool"], str):
        raise InputError("is damaged: arithmetic is not a number, or loratool not a text")
    if value["arithmetic"] != ARITHMETIC_VERSION:
        what = f"was written with arithmetic {value['arithmetic']}, by loratool {brief(value['loratool'])}"
        raise InputError(f"{what}; this loratool has {ARITHMETIC_VERSION}")
    if value["recipe"] != meaning_of(steps):
        raise InputError("is the lock of another recipe")
    listed = value["steps"]
    if not isinstance(listed, list) or len(listed) != len(steps):
        raise InputError(f"is damaged: steps is not a list of {len(steps)}")
    for step, record in zip(steps, listed, strict=True):
        where = f"step {step.number}"
        _require_keys(record, ("command", "inputs", "outputs"), where)
        if record["command"] != step.command:
            raise InputError(f"is damaged: {where} is {brief(record['command'])}, not {step.command}")
        for side, paths in (("inputs", step.reads), ("outputs", step.writes)):
            _require_keys(record[side], paths, f"{side} of {where}")
            for path in paths:
                _require_record(record[side][path], f"{path} in {side} of {where}")
    return [{side: record[side] for side in ("inputs", "outputs")} for record in listed]


def _require_keys(value: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"is damaged: {where} is not a mapping")
    known = {*keys}
    for key in value:
        if key not in known:
            raise InputError(f"is damaged: {where} has no {brief(key)}")
    for key in keys:
        if key not in value:
            raise InputError(f"is damaged: {where} lacks {brief(key)}")


def _require_record(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not value:
        raise InputError(f"is damaged: {where} is not a mapping of digests")
    for key, text in value.items():
        form = COMMIT if key == "revision" else SHA256
        if key not in FACTS or not isinstance(text, str) or not form.fullmatch(text):
            raise InputError(f"is damaged: {brief(key)} of {where} is {brief(text)}")
    if sum(key in value for key in CONTENT) > 1 or not {"config", *CONTENT} & value.keys():
        raise InputError(f"is damaged: {where} has not one digest")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
