"""Check where an output may be written, before anything is: what it replaces, and what it must not."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import NeedsFlag, UsageError
from .checkpoint import Checkpoint
from .foreign_files import find_foreign_file
from .output import CONTAINERS, Output
from .partial import former_path, partial_path, set_aside
from .side_files import is_undo_file, undo_path
from .undo_places import formers_of, numbered_undo_files

# Suffixes of files that no container writes, and that hardly anyone gives to a folder
OTHER_FILES = (".txt", ".json", ".yaml", ".gz", ".zip", ".tar", ".safetensor", ".npz", ".onnx")


def output_path(out: str | os.PathLike[str] | None, base: Checkpoint, command: str) -> tuple[Path, bool]:
    """Return the output's path and whether it is a single file.

    Without `out` the path is the command's name, and a file if the base was given as a file.

    Raises:
        UsageError: the suffix is that of another container than the base's.
    """
    if out is None:
        ending = CONTAINERS[base.container][0]
        return Path(f"{command}{ending}" if base.given_as_file else command), base.given_as_file
    return check_output_name(out, base.container)


def check_output_name(out: str | os.PathLike[str], container: str = "safetensors") -> tuple[Path, bool]:
    """Return a given output's path and whether it is a single file, by its suffix.

    Raises:
        UsageError: the suffix is that of another container, a key of CONTAINERS, or of no file that is written.
    """
    path, suffixes = Path(out), CONTAINERS[container]
    if os.fspath(out) == "-":
        message = "an output is written in any order and renamed when it is whole, which no stream is"
        raise UsageError(message, culprit="-", remedy="name a file or a folder with -o")
    if path.name in ("", ".."):
        raise UsageError(f"{os.fspath(out)!r} names no file or folder of its own", remedy="name the output with -o")
    suffix, written = path.suffix.lower(), {each for ends in CONTAINERS.values() for each in ends}
    if path.suffix not in suffixes and (suffix in written or (suffix in OTHER_FILES and not path.is_dir())):
        raise UsageError(
            f"{path.suffix} is no name for a {container} file",
            culprit=str(path),
            remedy=f"name a folder or a {suffixes[0]} file",
        )
    return path, path.suffix in suffixes


def check_output_path(
    path: Path,
    is_file: bool,
    inputs: list[Path],
    force: bool,
    is_model: bool = False,
    contents: Mapping[str, bytes] | None = None,
    dry_run: bool = False,
) -> bool:
    """Refuse an output path before anything is written; return whether a dry run found what --force would replace.

    Args:
        inputs: the files that are read, which the output must not replace.
        force: whether an existing output may be replaced. A folder with other files than a model's never is.
        is_model: whether the output is a model and not an adapter. Only a model may replace a merged model that has
            an undo file (see `check_undo_files`).
        contents: of side files that will be written, by name, as far as they are known.
        dry_run: pass where the output exists, and say so.

    Raises:
        UsageError: the path cannot be the output.
        NeedsFlag: it can with --force.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UsageError(
            "there is no such folder to write into",
            culprit=str(parent),
            remedy="make it first, or name another output with -o",
        )
    for place in (path, partial_path(path), former_path(path)):
        if any(_contains(place, source) for source in inputs):
            raise UsageError(
                "the output would overwrite an input", culprit=str(path), remedy="name another output with -o"
            )
    if not is_file and not force and not dry_run and (former := set_aside(path)):
        raise NeedsFlag(
            f"exists already, as {former.name}: a run was killed while it replaced it",
            culprit=str(path),
            remedy="add --force to replace it, or name another with -o",
        )
    if not os.path.lexists(path):
        return dry_run and not force and not is_file and set_aside(path) is not None
    if path.is_symlink() or path.is_dir() is is_file:
        raise UsageError("exists and is of another kind than the output", culprit=str(path))
    if not is_file:
        if os.path.ismount(path):
            raise UsageError(
                "is a mount point, which no rename can replace", culprit=str(path), remedy="name a folder in it"
            )
        if not any(path.iterdir()):
            return False
        origins = {place for source in inputs for place in (source.parent, source.parent.parent)}
        foreign = find_foreign_file(path, origins, contents or {})
        if foreign:
            raise UsageError(
                f"holds {foreign}; --force replaces a model's files and nothing else",
                culprit=str(path),
                remedy="name another output with -o",
            )
    first = undo_path(path, True)
    if is_file and not is_model and (is_undo_file(first) or formers_of(first)):
        why = f"is a merged model, and its undo file {first.name} would be left to an adapter"
        raise UsageError(why, culprit=str(path), remedy="name another output with -o")
    if not force and not dry_run:
        raise NeedsFlag(
            "exists already", culprit=str(path), remedy="add --force to replace it, or name another with -o"
        )
    return not force


def check_undo_files(output: Output, inputs: Collection[Path], force: bool) -> None:
    """Refuse an output whose undo files would replace an input, a foreign file, or without --force any file.

    Raises:
        UsageError: they would replace an input or a file that is no undo file.
        NeedsFlag: there are undo files beside the output, and `force` is false.
    """
    if not output.has_undo_beside:
        return
    mine, first = output.undo_places, undo_path(output.path, True)
    for place in dict.fromkeys((*mine, *numbered_undo_files(first), *formers_of(first).values())):
        if not os.path.lexists(place):
            continue
        if any(_contains(place, source) for source in (*inputs, *output.carried.values())):
            raise UsageError(
                "the output would replace this input", culprit=str(place), remedy="name another output with -o"
            )
        if place in mine and not is_undo_file(place):
            raise UsageError("is no undo file and in the way of one", culprit=str(place), remedy="move it away")
        if not force:
            raise NeedsFlag("exists already", culprit=str(place), remedy="add --force to replace it")


def _contains(place: Path, source: Path) -> bool:
    """Return whether `source`, by name or through links, is `place` or is in it."""
    places = {Path(os.path.abspath(place)), Path(os.path.realpath(place))}
    sources = {Path(os.path.abspath(source)), Path(os.path.realpath(source))}
    return any(there == here or here in there.parents for here in places for there in sources)
