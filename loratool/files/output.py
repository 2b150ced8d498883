"""An output checkpoint: what it consists of, where it may go, and how it appears there whole or not at all.

`layout` decides what is in its files, before the first byte; `rewrite` fills them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import NeedsFlag, UsageError
from .checkpoint import PICKLES, Checkpoint
from .dtypes import TensorSpec
from .fileio import (
    former_path,
    partial_file,
    partial_folder,
    partial_path,
    require_free_space,
    set_aside,
    write_at,
    write_file,
)
from .side_files import find_foreign_file, is_undo_file, undo_path
from .torch_writer import Archive
from .undo_places import KeptUndo, formers_of, numbered_undo_files
from .weights_file import WeightsFile, require_unchanged

# What a checkpoint's weights can lie in -> how a single file of it is named.
CONTAINERS = {"safetensors": (".safetensors",), "torch": PICKLES}


@dataclass(frozen=True)
class OutputFile:
    """One file of weights to be: `header` is all before the first tensor, `begin` each one's first byte in file order.

    archive: of a torch file, which says what is to be written besides once the tensors are there.
    """

    name: str
    header: bytes
    begin: Mapping[str, int]
    nbytes: int
    archive: Archive | None = None


@dataclass(frozen=True)
class Output:
    """A checkpoint to be.

    `extras` are small files by name with their content; `travels` are side files by name with their origin.
    `undo` is where an undo file will be, and `carried` where the earlier ones go: target -> origin. inputs: the files
    that it is made of, which must be the same until it is whole.
    """

    path: Path
    is_file: bool
    specs: Mapping[str, TensorSpec]
    files: tuple[OutputFile, ...]
    extras: Mapping[str, bytes]
    travels: Mapping[str, Path]
    not_copied: tuple[str, ...]
    provenance: str = ""
    undo: Path | None = None
    carried: Mapping[Path, Path] = field(default_factory=dict)
    inputs: tuple[WeightsFile, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the weight files."""
        return sum(file.nbytes for file in self.files)

    def require_space(self) -> None:
        """Raises MachineError where the disk is too small for all that will be written."""
        beside = sum(origin.stat().st_size for origin in (*self.travels.values(), *self.carried.values()))
        beside += sum(len(data) for data in self.extras.values())
        require_free_space(self.path.absolute().parent, self.nbytes + beside)


@dataclass(frozen=True)
class OutputEdits:
    """What an output has otherwise than its base: tensors reshaped or new, fields of config.json, side files.

    shared: tensors that have another one's bytes -> that one; left_out: those of them that are no
    tensors of their own in a safetensors file (in a torch file none is).
    """

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    left_out: Collection[str] = ()


def output_path(out: str | os.PathLike[str] | None, base: Checkpoint, verb: str) -> tuple[Path, bool]:
    """The output's path and whether it is a single file: by its suffix, else as the base was given."""
    if out is None:
        return Path(f"{verb}.safetensors" if base.given_as_file else verb), base.given_as_file
    return check_output_name(out)


def check_output_name(out: str | os.PathLike[str], container: str = "safetensors") -> tuple[Path, bool]:
    """A given output's path and whether it is a single file. Raises UsageError for a file of no such container."""
    path, suffixes = Path(out), CONTAINERS[container]
    if path.name in ("", ".."):
        raise UsageError(f"{os.fspath(out)!r} names no file or folder of its own", remedy="name the output with -o")
    if path.suffix in (".gguf", ".safetensors", *PICKLES) and path.suffix not in suffixes:
        raise UsageError(
            f"{path.suffix} is no name for a {container} file",
            culprit=str(path),
            remedy=f"name a folder or a {suffixes[0]} file",
        )
    return path, path.suffix in suffixes


def check_output_path(path: Path, is_file: bool, inputs: list[Path], force: bool, is_model: bool = False) -> None:
    """Refuse an output that is or holds an input, that exists without --force, or that --force must not replace: of
    another kind, of strangers' files; a merged model with its undo file, unless it `is_model` (`check_undo_files`).
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
    if not is_file and not force and (former := set_aside(path)):
        raise NeedsFlag(
            f"exists already, as {former.name}: a run was killed while it replaced it",
            culprit=str(path),
            remedy="add --force to replace it, or name another with -o",
        )
    if not os.path.lexists(path):
        return
    if path.is_symlink() or path.is_dir() is is_file:
        raise UsageError("exists and is of another kind than the output", culprit=str(path))
    if not is_file:
        if os.path.ismount(path):
            raise UsageError(
                "is a mount point, which no rename can replace", culprit=str(path), remedy="name a folder in it"
            )
        if not any(path.iterdir()):
            return
        foreign = find_foreign_file(path)
        if foreign:
            raise UsageError(
                f"holds {foreign}; --force replaces a model's files and nothing else",
                culprit=str(path),
                remedy="name another output with -o",
            )
    first = undo_path(path, True)
    if is_file and not is_model and (is_undo_file(first) or formers_of(first)):
        said = f"is a merged model, and its undo file {first.name} would be left to an adapter"
        raise UsageError(said, culprit=str(path), remedy="name another output with -o")
    if not force:
        raise NeedsFlag(
            "exists already", culprit=str(path), remedy="add --force to replace it, or name another with -o"
        )


def check_undo_files(output: Output, inputs: Collection[Path], force: bool) -> None:
    """The same for the undo files beside a single file, which are replaced with it."""
    if not _has_undo(output):
        return
    mine, first = _undo_places(output), undo_path(output.path, True)
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


def _has_undo(output: Output) -> bool:
    """Whether undo files beside it are its own: those beside a torch file are not."""
    return output.is_file and output.path.suffix == ".safetensors"


def _undo_places(output: Output) -> list[Path]:
    """Where undo files will be beside a single file."""
    return [*([output.undo] if output.undo else []), *output.carried]


def _contains(place: Path, source: Path) -> bool:
    """Whether `source`, by name or through links, is `place` or lies in it."""
    places = {Path(os.path.abspath(place)), Path(os.path.realpath(place))}
    sources = {Path(os.path.abspath(source)), Path(os.path.realpath(source))}
    return any(there == here or here in there.parents for here in places for there in sources)


@contextmanager
def open_output(output: Output) -> Iterator[dict[str, BinaryIO]]:
    """The output's weight files by name, sized and with their headers, to be filled by offset in any order.

    Where the output has an undo file, that is there under its own name, empty.

    When the block ends well all is synced, the side files and the index follow, and the output gets its name;
    when it does not, nothing stays. An error of the machine names the output.
    """
    with naming_output(output.path), ExitStack() as stack:
        targets: dict[str, BinaryIO] = {}
        if output.is_file:
            kept = stack.enter_context(KeptUndo(output.path, _undo_places(output))) if _has_undo(output) else None
            targets[output.files[0].name] = stack.enter_context(partial_file(output.path))
            if kept:
                kept.set_aside()
                stack.push(kept.clear)
            if output.undo:  # entered later, so it has its name before the weights have theirs
                targets[output.undo.name] = stack.enter_context(partial_file(output.undo))
            for place, origin in output.carried.items():
                _copy_into(stack.enter_context(partial_file(place)), origin)
        else:
            folder = stack.enter_context(partial_folder(output.path))
            for file in output.files:
                (folder / file.name).parent.mkdir(exist_ok=True)
                targets[file.name] = stack.enter_context(open(folder / file.name, "w+b", buffering=0))
            if output.undo:
                targets[output.undo.name] = stack.enter_context(open(folder / output.undo.name, "w+b", buffering=0))
            for place, origin in output.carried.items():
                shutil.copyfile(origin, folder / place.name)
        for file in output.files:
            targets[file.name].truncate(file.nbytes)
            write_at(targets[file.name], memoryview(file.header), 0)
        yield targets
        require_unchanged(output.inputs)
        for target in targets.values():  # all, before the first has its name
            os.fsync(target.fileno())
        if not output.is_file:
            for target in targets.values():
                target.close()  # Windows renames no folder with open files
            _write_side_files(output, folder)


def _copy_into(target: BinaryIO, origin: Path) -> None:
    with open(origin, "rb") as source:
        shutil.copyfileobj(source, target)


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """An error of the machine that names no file names this output."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _write_side_files(output: Output, folder: Path) -> None:
    for name, origin in output.travels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, folder / name)
    for name, data in output.extras.items():
        write_file(folder / name, data)
