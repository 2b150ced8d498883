"""Check an output checkpoint's place, and make it appear there whole or not at all.

`output_plan` decides the content of its files before the first byte; `streaming.rewrite` fills them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import NeedsFlag, UsageError
from . import disk
from .checkpoint import Checkpoint
from .dtypes import TensorSpec
from .fileio import copy_file, copy_range, open_for_reading, open_new, require_free_space, write_at, write_file
from .foreign_files import find_foreign_file
from .gguf_file import GGUF
from .model_folder import PICKLES
from .partial import former_path, partial_file, partial_folder, partial_path, set_aside
from .side_files import LeftBehind, is_undo_file, undo_path
from .torch_writer import Archive
from .undo_places import KeptUndo, formers_of, numbered_undo_files
from .weights_file import WeightsFile, require_unchanged

# The formats of a checkpoint's weights files -> the suffixes of a single file
CONTAINERS = {"safetensors": (".safetensors",), "torch": PICKLES, GGUF: (".gguf",)}


# Suffixes of the files beside which undo files are
UNDONE = (*CONTAINERS["safetensors"], *CONTAINERS[GGUF])


# Suffixes of files that no container writes, and that hardly anyone gives to a folder
OTHER_FILES = (".txt", ".json", ".yaml", ".gz", ".zip", ".tar", ".safetensor", ".npz", ".onnx")


@dataclass(frozen=True)
class OutputFile:
    """A weights file that will be written."""

    name: str  # relative to the output's folder
    header: bytes  # all bytes before the first tensor
    begin: Mapping[str, int]  # tensor -> its first byte, in file order
    nbytes: int
    archive: Archive | None = None  # of a torch file, whose end is written after the tensors


@dataclass(frozen=True)
class Output:
    """A checkpoint that will be written."""

    path: Path
    is_file: bool
    specs: Mapping[str, TensorSpec]  # of the tensors that its files store
    files: tuple[OutputFile, ...]
    extras: Mapping[str, bytes]  # name of a small file -> its content
    travels: Mapping[str, Path]  # name of a side file -> the file to copy
    left_behind: tuple[LeftBehind, ...]  # what beside the base does not travel
    provenance: str = ""  # the value of the metadata key `loratool`
    undo: Path | None = None  # the new undo file
    carried: Mapping[Path, Path] = field(default_factory=dict)  # path of an earlier merge's undo file -> file to copy
    inputs: tuple[WeightsFile, ...] = ()  # must not change until the output is whole

    @property
    def not_copied(self) -> tuple[str, ...]:
        """Return the names of what does not travel."""
        return tuple(each.name for each in self.left_behind)

    @property
    def nbytes(self) -> int:
        """Return the size of the weights files, without side files and undo files."""
        return sum(file.nbytes for file in self.files)

    def require_space(self) -> None:
        """Raise MachineError if the disk is too small for all that will be written."""
        beside = sum(origin.stat().st_size for origin in (*self.travels.values(), *self.carried.values()))
        beside += sum(len(data) for data in self.extras.values())
        require_free_space(self.path.absolute().parent, self.nbytes + beside)


@dataclass(frozen=True)
class OutputEdits:
    """The differences of an output from its base, besides the tensors' values."""

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)  # of reshaped, decoded and new tensors
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json, and of a language model's in it
    top: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json alone: its class and labels
    files: Mapping[str, Path] = field(default_factory=dict)  # name of a side file -> the file to copy
    shared: Mapping[str, str] = field(default_factory=dict)  # tensor -> the tensor whose bytes it shares
    left_out: Collection[str] = ()  # of `shared`, those that a safetensors file does not store (a torch file: none)
    removed: Collection[str] = ()  # tensors of the base that no container stores
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # component's prefix -> config.json
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name of a JSON side file -> its content
    dropped: Mapping[str, str] = field(default_factory=dict)  # side file that does not travel -> the reason
    beside: Mapping[str, str] = field(default_factory=dict)  # new tensor -> the base's, in whose file it is
    metadata: Mapping[str, str] = field(default_factory=dict)  # of all files, before the base's
    decoded_modules: Collection[str] = ()  # modules whose weights are codes in the base, and numbers here


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
    """Return whether undo files beside the output are its own: those beside a torch file are not."""
    return output.is_file and output.path.suffix in UNDONE


def _undo_places(output: Output) -> list[Path]:
    """Return the paths of the undo files that will be written beside a single file."""
    return [*([output.undo] if output.undo else []), *output.carried]


def _contains(place: Path, source: Path) -> bool:
    """Return whether `source`, by name or through links, is `place` or is in it."""
    places = {Path(os.path.abspath(place)), Path(os.path.realpath(place))}
    sources = {Path(os.path.abspath(source)), Path(os.path.realpath(source))}
    return any(there == here or here in there.parents for here in places for there in sources)


@contextmanager
def open_output(output: Output, told: Mapping[str, bytes]) -> Iterator[dict[str, BinaryIO]]:
    """Open the output's files by name: weights files sized and with their headers, and the undo file, empty.

    The block fills them by offset in any order. If it ends well, all is synced, the side files and the index follow,
    and the output gets its name; if not, nothing stays. An OSError names the output.

    Args:
        told: small files whose content the block only tells, instead of that in its extras
    """
    with naming_output(output.path), ExitStack() as stack:
        targets: dict[str, BinaryIO] = {}
        if output.is_file:
            kept = KeptUndo(output.path, _undo_places(output)) if _has_undo(output) else None
            targets[output.files[0].name] = stack.enter_context(partial_file(output.path, kept))
            if kept:
                stack.push(kept.clear)
            if output.undo:  # entered later, so it has its name before the weights have theirs
                targets[output.undo.name] = stack.enter_context(partial_file(output.undo))
            for place, origin in output.carried.items():
                _copy_into(stack.enter_context(partial_file(place)), origin)
        else:
            folder = stack.enter_context(partial_folder(output.path))
            for file in output.files:
                disk.make_folder((folder / file.name).parent)
                targets[file.name] = stack.enter_context(open_new(folder / file.name))
            if output.undo:
                place = folder / output.undo.relative_to(output.path)
                targets[output.undo.name] = stack.enter_context(open_new(place))
            for place, origin in output.carried.items():
                copy_file(origin, folder / place.relative_to(output.path))
        for file in output.files:
            disk.truncate(targets[file.name], file.nbytes)
            write_at(targets[file.name], memoryview(file.header), 0)
        yield targets
        require_unchanged(output.inputs)
        for target in targets.values():  # all, before the first has its name
            disk.sync(target)
        if not output.is_file:
            for target in targets.values():
                target.close()  # Windows renames no folder with open files
            _write_side_files(output, folder, told)


def _copy_into(target: BinaryIO, origin: Path) -> None:
    with open_for_reading(origin) as source:
        copy_range(source, 0, target, 0, os.fstat(source.fileno()).st_size)


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """Give `path` to an OSError of the block that names no file, or the file that was copied onto a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = str(path)
        raise


def _write_side_files(output: Output, folder: Path, told: Mapping[str, bytes]) -> None:
    for name in (*output.travels, *output.extras):
        disk.make_folder((folder / name).parent)
    for name, origin in output.travels.items():
        copy_file(origin, folder / name)
    for name, data in {**output.extras, **told}.items():
        write_file(folder / name, data)
