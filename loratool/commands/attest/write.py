"""Write a statement about the output of a command: in-toto v1 with SLSA provenance v1.

It names the output's files with their sha256, the call as a recipe, and the inputs with their digests. It has no date,
and nothing of the machine, so the same call on the same inputs makes the same bytes. It is not signed: other tools sign
it, and `hold` needs no signature, as it computes the merge again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from ...adapters.formats.peft_config import CONFIG_NAME
from ...binding.merge.choices import TOKENIZERS
from ...durable.fileio import sha256_file, write_at
from ...durable.partial import partial_file
from ...errors import InputError, NeedsFlag, UsageError, shell_word
from ...files.checkpoint import open_checkpoint
from ...files.folder.side_files import undo_files, undo_path
from ...files.hub.cache import resolve
from ...files.hub.names import HubName, parse_hub_name, pinned_name
from ...files.output.output import naming_output
from ...files.output.paths import check_place, require_outside
from ...files.weights_file import paths_of
from ...numerics.merge import ARITHMETIC_VERSION
from ...streaming.parallel import map_in_order, worker_count
from ..adapter_requests import ADAPTERS_TYPE, parse_adapters
from ..arguments import PATH_TYPE, arguments_of
from ..calls import Call
from ..digests import digest_of_path, opened_files
from ..run.steps import WRITTEN, function_for, read_step
from ..run.write import recipe_of
from ..statements import BUILD_TYPE, BUILDER, CONFIG_DIGEST, MODEL_DIGEST, encode_statement, is_statement

R = TypeVar("R")

OTHER = "choose another file with --attest"

OF_THE_MACHINE = ("attest", "device", "force", "resume")  # words of a recipe that decide no byte of the output

ADAPTERS = ("adapter", "initial")  # inputs with a config that has what tensors do not

PLAIN_FILES = ("imatrix", "undo")  # inputs that hold no tensors of a model


def attested(call: Call[R], work: Callable[[Call[R]], R]) -> R:
    """Run a command, and if it succeeds write the statement that its argument `attest` names.

    Raises:
        UsageError: the statement cannot be written there, or the run is dry.
        NeedsFlag: it exists.
    """
    options = vars(call)
    place, command = Path(options["attest"]), call.work.partition(".")[0]
    _check_statement_path(place, bool(options.get("force")), bool(options.get("dry_run")))
    out = arguments_of(type(call)).get("out")
    if out and out.opt:
        require_outside(place, Path(options["out"] or out.opt.default.partition(",")[0]), "--attest")
    report = work(call)
    result: Any = report
    if result.said_no is None:
        _write(place, command, options, result)
    return report


def _check_statement_path(path: Path, force: bool, dry_run: bool) -> None:
    if path.suffix.lower() != ".json":
        remedy = f"name it {shell_word((path.stem or 'output') + '.intoto.json')}"
        raise UsageError("a statement's file ends in .json", culprit=str(path), remedy=remedy)
    if dry_run:
        raise UsageError("a dry run writes no statement", culprit=str(path), remedy="remove --dry-run")
    check_place(path, True, remedy=OTHER)
    if path.exists() and not is_statement(path):
        raise UsageError("is not a statement, so it is not replaced", culprit=str(path), remedy=OTHER)
    if path.exists() and not force:
        raise NeedsFlag("exists already", culprit=str(path), flags="--force", why="to replace it")


def _write(place: Path, command: str, options: Mapping[str, Any], report: Any) -> None:
    given = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in options.items()}
    recipe = recipe_of(function_for(command), given, getattr(report, "out", ""))
    recipe = {word: value for word, value in recipe.items() if word not in OF_THE_MACHINE}
    inputs = [*inputs_of(recipe)]
    if command == "unmerge" and "undo" not in recipe and report.undo:  # found by itself
        inputs.append(("undo", report.undo))
    files = _proven_files(report.merged) if command == "verify" else _written_files(Path(report.out))
    with closing(map_in_order(sha256_file, files.values(), worker_count())) as hashes:
        subjects = dict(zip(files, hashes, strict=True))
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": recipe,
            "internalParameters": {"arithmetic": ARITHMETIC_VERSION},
            "resolvedDependencies": [_described(name, path) for name, path in inputs],
        },
        "runDetails": {"builder": {"id": BUILDER, "version": {"loratool": version("loratool")}}},
    }
    statement = encode_statement(subjects, predicate)
    with naming_output(place), partial_file(place) as file:
        write_at(file, memoryview(statement), 0)


def inputs_of(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the inputs of a recipe of one step, as names of what they are and paths, in the order of the arguments.

    The model that `verify` proves is none.
    """
    step = read_step(1, recipe)
    for name, argument in arguments_of(step.function).items():
        value = step.arguments.get(name)
        if value is None or name in WRITTEN or (step.command == "verify" and name == "merged"):
            continue
        if argument.type == ADAPTERS_TYPE:
            yield from (("adapter", each.path) for each in parse_adapters(value))
        elif argument.type == PATH_TYPE and not (name == "tokenizer" and value in TOKENIZERS):
            yield argument.word, str(value)


def _written_files(out: Path) -> dict[str, Path]:
    """Return the files of an output by their names in its folder. A merged file's undo files belong to it."""
    if not out.is_dir():
        return {place.name: place for place in (out, *undo_files(undo_path(out, True)))}
    return {place.relative_to(out).as_posix(): place for place in sorted(out.rglob("*")) if place.is_file()}


def _proven_files(model: str) -> dict[str, Path]:
    """Return the weights files of a model by their names in its folder: `verify` proves no others."""
    with closing(open_checkpoint(model)) as opened:
        return names_of_weights(opened.root, paths_of(opened.shards))


def names_of_weights(folder: Path, paths: list[Path]) -> dict[str, Path]:
    """Return weights files by their names in the model's folder.

    Raises:
        InputError: one is elsewhere.
    """
    names = {Path(os.path.relpath(path, folder)).as_posix(): path for path in paths}
    if outside := [path for name, path in names.items() if name.startswith("..")]:
        raise InputError(f"is not in {folder}, so no statement can name it", culprit=str(outside[0]))
    return names


def _described(name: str, path: str) -> dict[str, Any]:
    """Return an input as in-toto's resource descriptor."""
    found = resolve(path, config_alone=True)
    hub = pinned_name(found)
    entry: dict[str, Any] = {"name": name, "uri": uri_of(hub) if hub else path}
    if hub:
        asked = None if os.path.lexists(path) else parse_hub_name(path)
        entry["annotations"] = {"hubCommit": hub.revision}
        if asked and asked.revision:
            entry["annotations"]["hubRevision"] = asked.revision
    digests = digests_of(name, found)
    return {**entry, "digest": digests} if digests else entry


def uri_of(name: HubName) -> str:
    return f"hf://{str(name).removeprefix('hf://')}"


def digests_of(name: str, path: Path) -> dict[str, str]:
    """Return the digests of an input: of its tensors, of its file if it is one, and of an adapter's config.

    A tokenizer's folder has none.
    """
    if name in PLAIN_FILES:
        return {"sha256": sha256_file(path)}
    try:
        with opened_files(path) as files:
            paths = paths_of(files)
    except InputError:  # a tokenizer's folder, or a config that was enough
        config = path / "config.json" if path.is_dir() else path
        return {"sha256": sha256_file(config)} if config.is_file() else {}
    digests = {MODEL_DIGEST: digest_of_path(path)}
    if len(paths) == 1:
        digests["sha256"] = sha256_file(paths[0])
    config = paths[0].parent / CONFIG_NAME
    if name in ADAPTERS and config.is_file():
        digests[CONFIG_DIGEST] = sha256_file(config)
    return digests
