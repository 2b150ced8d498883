"""Describe an output checkpoint, and make it appear complete or not at all.

`output.paths` checks what it may replace, `output.plan` decides the layout of its files before the first byte is
written, and `streaming.rewrite` fills them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ...durable import disk
from ...durable.descriptors import kept_open
from ...durable.fileio import (
    copy_file,
    copy_range,
    file_length,
    lacking_space,
    length_of,
    occupied,
    open_for_reading,
    open_new,
    require_free_space,
    write_at,
    write_file,
)
from ...durable.journal import require_same
from ...durable.partial import partial_file, partial_folder, partial_path
from ...errors import MachineError
from ..containers.gguf_file import GGUF
from ..containers.torch_writer import Archive
from ..dtypes import TensorSpec
from ..folder.model_folder import PICKLES
from ..folder.side_files import LeftBehind
from ..stores.outgoing import SPACE, outgoing_of
from ..weights_file import WeightsFile, described_inputs, require_unchanged
from .undo_places import Belongs, cleared_undo, kept_undo

# The formats of a checkpoint's weights files -> the suffixes of a single file
CONTAINERS = {"safetensors": (".safetensors",), "torch": PICKLES, GGUF: (".gguf",)}

# Suffixes of files that have undo files beside them
UNDONE = (*CONTAINERS["safetensors"], *CONTAINERS[GGUF])


@dataclass(frozen=True)
class OutputFile:
    """A weights file that will be written."""

    name: str  # relative to the output's folder
    header: bytes  # all bytes before the first tensor
    begin: Mapping[str, int]  # tensor -> its first byte, in file order
    nbytes: int
    archive: Archive | None = None  # of a torch file; its end is written after the tensors


@dataclass(frozen=True)
class Output:
    """A checkpoint that will be written."""

    path: Path
    is_file: bool
    specs: Mapping[str, TensorSpec]  # of the stored tensors
    files: tuple[OutputFile, ...]
    extras: Mapping[str, bytes]  # name of a small file -> its content
    side_files: Mapping[str, Path]  # name of a side file -> the file to copy
    left_behind: tuple[LeftBehind, ...]  # the base's side files that are not copied
    provenance: str = ""  # the value of the metadata key `loratool`
    undo: Path | None = None  # the new undo file
    carried: Mapping[Path, Path] = field(default_factory=dict)  # path of an earlier merge's undo file -> file to copy
    inputs: tuple[WeightsFile, ...] = ()  # must not change until the output is complete
    configs: tuple[Any, ...] = ()  # of the inputs
    call: Mapping[str, str] = field(default_factory=dict)  # what decides about its bytes: option -> value; empty if a
    # run cannot be resumed
    resume: bool = False  # resume a run that died

    @property
    def not_copied(self) -> tuple[str, ...]:
        """Return the names of the side files that are not copied."""
        return tuple(each.name for each in self.left_behind)

    @property
    def has_undo_beside(self) -> bool:
        """Return whether undo files beside the output belong to it; those beside a torch file do not."""
        return self.is_file and self.path.suffix in UNDONE

    @property
    def undo_places(self) -> list[Path]:
        """Return the paths of the undo files that will be written."""
        return [*([self.undo] if self.undo else []), *self.carried]

    @property
    def nbytes(self) -> int:
        """Return the size of the weights files, without side files and undo files."""
        return sum(file.nbytes for file in self.files)

    def head(self) -> dict[str, dict[str, Any]]:
        """Return the head of the run's journal: everything that determines the output's bytes, by name."""
        places = sorted(place.name for place in self.undo_places)  # names only: the folder may be given in many ways
        layout = hashlib.sha256(repr((self.is_file, bool(self.undo), places, sorted(self.side_files))).encode())
        for file in self.files:
            layout.update(repr((file.name, file.nbytes, hashlib.sha256(file.header).hexdigest())).encode())
        for name, data in sorted(self.extras.items()):
            layout.update(repr((name, hashlib.sha256(data).hexdigest())).encode())
        inputs = described_inputs(self.inputs, self.configs)
        return {"options": dict(self.call), "inputs": inputs, "output": {"the layout": [layout.hexdigest()]}}

    @property
    def needed_bytes(self) -> int:
        """Return the free bytes that the output needs on the disk, without the new undo file."""
        beside = sum(length_of(origin) for origin in (*self.side_files.values(), *self.carried.values()))
        beside += sum(len(data) for data in self.extras.values())
        held = occupied(partial_path(self.path))  # bytes of a run that died; they are replaced or resumed
        if outgoing_of(self.path) and not any(file.archive for file in self.files):
            return min(self.nbytes, SPACE) + beside
        return max(0, self.nbytes + beside - held)

    def place_of(self, file: OutputFile) -> Path:
        """Return the path of a weights file when the output is complete."""
        return self.path if self.is_file else self.path / file.name

    @property
    def parent(self) -> Path:
        """Return the folder of the output."""
        return self.path.absolute().parent

    def require_space(self) -> None:
        """Raise MachineError if the disk is too small for the output."""
        require_free_space(self.parent, self.needed_bytes)

    def require_own_journal(self) -> None:
        """Raise UsageError, in a dry run, if the journal to resume from is of another run."""
        if self.resume:
            require_same(self.path, self.head())

    def space_warning(self) -> tuple[str, ...]:
        """Return the warning of a dry run if `require_space` would raise."""
        lack = lacking_space(self.parent, self.needed_bytes)
        return (f"{self.parent}: {lack}",) if lack else ()


@dataclass(frozen=True)
class OutputEdits:
    """The differences between an output and its base other than tensors' values."""

    specs: Mapping[str, TensorSpec] = field(default_factory=dict)  # of reshaped, dequantized and new tensors
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json, and of a language model's in it
    top: Mapping[str, Any] = field(default_factory=dict)  # fields of config.json alone: its class and labels
    files: Mapping[str, Path] = field(default_factory=dict)  # name of a side file -> the file to copy
    shared: Mapping[str, str] = field(default_factory=dict)  # tensor -> the tensor whose bytes it shares
    skipped_tensors: Collection[str] = ()  # tensors in `shared` that safetensors files do not store
    removed: Collection[str] = ()  # tensors of the base that no container stores
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # component's prefix -> config.json
    extras: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # name of a JSON side file -> its content
    skipped_files: Mapping[str, str] = field(default_factory=dict)  # side file that is not copied -> the reason
    beside: Mapping[str, str] = field(default_factory=dict)  # new tensor -> the base's tensor in the same file
    metadata: Mapping[str, str] = field(default_factory=dict)  # of all files, before the base's
    decoded_modules: Collection[str] = ()  # modules whose weights are codes in the base, and numbers here


@contextmanager
def open_output(
    output: Output, late: Mapping[str, bytes], belongs: Belongs, goes_on: Callable[[], bool] = bool
) -> Iterator[dict[str, BinaryIO]]:
    """Open the output's files by name: weights files sized and with their headers, and an empty undo file.

    The block fills them by offset in any order. If it succeeds, everything is synced, the side files and the index are
    written, and the output is renamed to its path. If not, only the journaled work of a run that died stays. An OSError
    names the output.

    Args:
        late: small files whose content the block determines, replacing that in the output's extras
        goes_on: is called when the output is locked. It returns whether the run resumes, so that the weights in the
            files are kept
    """
    built = partial_path(output.path)

    def left() -> list[Path]:
        places = [built if output.is_file else built / file.name for file in output.files]
        return places if goes_on() else []

    with naming_output(output.path), ExitStack() as stack:
        targets: dict[str, BinaryIO] = {}
        if output.is_file:
            beside = (output.path, output.undo_places) if output.has_undo_beside else None
            undo_files = kept_undo(*beside, belongs) if beside else None
            targets[output.files[0].name] = stack.enter_context(partial_file(output.path, undo_files, left))
            if beside:
                stack.enter_context(cleared_undo(*beside))
            if output.undo:  # entered later, so it is renamed before the weights
                targets[output.undo.name] = stack.enter_context(partial_file(output.undo))
            for place, origin in output.carried.items():
                _copy_into(stack.enter_context(partial_file(place)), origin)
        else:
            folder = stack.enter_context(partial_folder(output.path, left))
            if not any(folder.iterdir()):  # else a run that died has checked it
                _refuse_twins(folder, output, late)
            for file in output.files:
                place = folder / file.name
                disk.make_folder(place.parent)
                opened = stack.enter_context(open_new(place, "r+b" if place.exists() else "w+b"))
                targets[file.name] = stack.enter_context(kept_open(opened, partial(disk.open_file, place, "r+b")))
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
        for target in targets.values():  # all, before the first rename
            disk.sync(target)
        if not output.is_file:
            for target in targets.values():
                target.close()  # Windows cannot rename a folder with open files
            _write_side_files(output, folder, late)


@contextmanager
def join_output(output: Output) -> Iterator[dict[str, BinaryIO]]:
    """Open the weights files of an output that another process opened with `open_output`, and sync them at the end.

    They are filled by offset. The other process renames them.
    """
    built = partial_path(output.path)
    with naming_output(output.path), ExitStack() as stack:
        targets: dict[str, BinaryIO] = {}
        for file in output.files:
            again = partial(disk.open_file, built if output.is_file else built / file.name, "r+b")
            targets[file.name] = stack.enter_context(kept_open(stack.enter_context(again()), again))
        yield targets
        require_unchanged(output.inputs)
        for target in targets.values():
            disk.sync(target)


def _refuse_twins(folder: Path, output: Output, late: Mapping[str, bytes]) -> None:
    """Raise MachineError for files whose names the file system treats as equal, so that one would replace the other.

    Their names differ only in case, or in how Unicode composes a letter.
    """
    names = {*(file.name for file in output.files), *output.side_files, *output.extras, *late}
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    for first, *others in alike.values():
        if others:
            disk.make_folder((folder / first).parent)
            write_file(folder / first, b"")
        for name in others:
            if os.path.lexists(folder / name):
                message = f"would be {first} too: this file system does not tell the two names apart"
                raise MachineError(message, culprit=str(output.path / name), remedy="name a folder elsewhere with -o")


def _copy_into(target: BinaryIO, origin: Path) -> None:
    with open_for_reading(origin) as source:
        copy_range(source, 0, target, 0, file_length(source))


@contextmanager
def naming_output(path: Path) -> Iterator[None]:
    """Set an OSError's path to `path` if it has none, or if it names the source of a copy to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.filename = str(path)
        raise


def _write_side_files(output: Output, folder: Path, late: Mapping[str, bytes]) -> None:
    for name in (*output.side_files, *output.extras):
        disk.make_folder((folder / name).parent)
    for name, origin in output.side_files.items():
        copy_file(origin, folder / name)
    for name, data in {**output.extras, **late}.items():
        write_file(folder / name, data)
