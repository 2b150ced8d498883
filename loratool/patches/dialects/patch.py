"""What the dialects have in common: a patch of another program, its changes of tensors, and what is written as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ...errors import InputError, NeedsFlag, UsageError
from ...files.containers.safetensors_file import TensorFile
from ...files.dtypes import TensorSpec
from ...files.weights_file import WeightsFile, read_parts
from .checksums import new_hasher
from .streams import Pieces


@dataclass(frozen=True)
class Checksum:
    """What a patch says about the bytes of a tensor.

    Attributes:
        algorithm: a key of `checksums.HASHERS`, or what sums the patch itself.
        digest: as the file has it.
        of_result: it is the sum of the tensor's bytes after the change, and `ForeignChange.verified` compares it; else
            it is a sum of the patch, which `ForeignChange.applied` compares and which proves nothing of the base.
    """

    algorithm: str
    digest: str
    of_result: bool = True


class ForeignChange(ABC):
    """The change of one tensor.

    Attributes:
        name: the tensor's.
        place: the file with the change and the tensor, as errors name it.
        check: None if the dialect has none.

    Changes of one patch can be applied by several threads at once.
    """

    name: str
    place: str
    check: Checksum | None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return the bytes that it takes in the patch."""

    @abstractmethod
    def require(self, spec: TensorSpec) -> None:
        """Raise InputError if the change is not of a tensor with this dtype and shape. Only headers are read."""

    @abstractmethod
    def applied(self, pieces: Pieces, spec: TensorSpec) -> Iterator[memoryview]:
        """Yield the bytes after the change in order, in memory that does not grow with the tensor.

        Args:
            pieces: the bytes of the base's tensor in order; each may be overwritten once the next is asked for. So the
                changes of a chain are put one into the other.
            spec: of the base's tensor, as `require` has accepted it.

        Raises:
            InputError: the patch is damaged, or not of this tensor.
        """

    def verified(self, pieces: Pieces, spec: TensorSpec) -> Iterator[memoryview]:
        """Yield what `applied` yields; after the last byte, compare the result with the check."""
        if self.check is None or not self.check.of_result:
            yield from self.applied(pieces, spec)
            return
        hasher = new_hasher(self.check.algorithm)
        for piece in self.applied(pieces, spec):
            hasher.update(piece)
            yield piece
        if hasher.hexdigest() != self.check.digest:
            raise InputError(
                f"the result has not the {self.check.algorithm} that the patch says: another base, or a damaged patch",
                culprit=self.place,
            )


@dataclass
class ForeignPatch:
    """An open patch of another program, with only headers read.

    Attributes:
        dialect: the row's key.
        path: its folder or file.
        version, base_version: None if the dialect has none.
        changes: tensor -> its change, in the order of the files.
        how: the words that `describe_patch` puts in brackets: encoding, compression, checksum.
        complete: the patch has a change of every tensor of its base.
        files: the open files.
        scratch: a file without a name that has what was decompressed as a whole.
    """

    dialect: str
    path: Path
    version: int | None
    base_version: int | None
    changes: Mapping[str, ForeignChange]
    how: tuple[str, ...]
    complete: bool = False
    files: list[WeightsFile] = field(default_factory=list)
    scratch: BinaryIO | None = None

    def close(self) -> None:
        for file in self.files:
            file.close()
        if self.scratch:
            self.scratch.close()

    def require(self, specs: Mapping[str, TensorSpec], allow: Collection[str] = ()) -> dict[str, ForeignChange]:
        """Return the changes that are applied to a base, once all of them fit it.

        Args:
            specs: the tensors of the base.
            allow: `unverified` takes changes without any check, `unknown` leaves out those of tensors that the base
                does not have.

        Raises:
            InputError: a change is of another tensor than the base has.
            NeedsFlag: it could be applied with another word in `allow`.
        """
        unknown = [name for name in self.changes if name not in specs]
        if unknown and "unknown" not in allow:
            raise NeedsFlag(
                f"changes {unknown[0]}{others(unknown)}, which the base does not have",
                culprit=str(self.path),
                flags="--allow unknown",
                why="to leave it out, if the base is the right one",
            )
        if self.complete and (missing := [name for name in specs if name not in self.changes]):
            raise InputError(
                f"has no {missing[0]}{others(missing)}, and this dialect names every tensor of its base",
                culprit=str(self.path),
            )
        known = {name: change for name, change in self.changes.items() if name in specs}
        unchecked = [name for name, change in known.items() if change.check is None]
        if unchecked and "unverified" not in allow:
            raise NeedsFlag(
                f"has no check of {unchecked[0]}{others(unchecked)}: nothing proves the base or the result",
                culprit=str(self.path),
                flags="--allow unverified",
                why="to trust it all the same",
            )
        for name, change in known.items():
            change.require(specs[name])
        return known


def others(names: Collection[str]) -> str:
    """Return how many names there are beside the first, for a message; empty without any."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def open_tensor_files(paths: Iterable[Path]) -> list[TensorFile]:
    """Open safetensors files; all are closed if one cannot be read."""
    files: list[TensorFile] = []
    with closed_on_error(files):
        for path in paths:
            files.append(TensorFile(path))
    return files


@contextmanager
def closed_on_error(files: list[TensorFile]) -> Iterator[None]:
    """Close files if the block fails."""
    try:
        yield
    except BaseException:
        for file in files:
            file.close()
        raise


def require_flat(file: WeightsFile, name: str, culprit: str) -> int:
    """Return the length of a tensor that has compressed bytes; raise InputError if it is no run of bytes."""
    spec = file.specs.get(name)
    if spec is None:
        raise InputError(f"{file.path.name} has no tensor {name!r}", culprit=culprit)
    if spec.dtype != "U8" or len(spec.shape) != 1:
        raise InputError(f"is {spec} instead of a run of bytes", culprit=culprit)
    return spec.size


def stored_parts(file: WeightsFile, name: str) -> Iterator[memoryview]:
    """Yield the compressed bytes of a tensor in parts; each overwrites the one before."""
    return read_parts(file, name, 0, file.specs[name].nbytes)


def head_of(file: WeightsFile, name: str, count: int) -> bytes:
    """Return the first bytes of a tensor, all if it has fewer than `count`."""
    buffer = memoryview(bytearray(min(count, file.specs[name].nbytes)))
    file.read_bytes(name, 0, buffer)
    return bytes(buffer)


@dataclass(frozen=True)
class TensorPair:
    """A tensor of a base and of a target, to be written as a change.

    Attributes:
        base, target: None where the model does not have the tensor.
        read_base, read_target: return the bytes in pieces from the beginning; each call reads them again.
    """

    name: str
    base: TensorSpec | None
    target: TensorSpec | None
    read_base: Callable[[], Pieces]
    read_target: Callable[[], Pieces]

    def require_same(self, dialect: str) -> TensorSpec:
        """Return the spec of both sides; raise InputError if a patch that has no header of it cannot say the change."""
        instead = f"{dialect} cannot say it: write a patch of loratool, without --to"
        if self.base is None or self.target is None:
            what = "is a new tensor" if self.base is None else "is removed"
            raise InputError(what, culprit=self.name, remedy=instead)
        if self.base != self.target:
            raise InputError(f"is {self.base}, and becomes {self.target}", culprit=self.name, remedy=instead)
        return self.base


@dataclass(frozen=True)
class PatchSteps:
    """The versions that a written patch names."""

    step: int
    base_step: int

    @classmethod
    def following(cls, step: int | None, base_step: int | None, dialect: str) -> PatchSteps:
        """Return the versions of a dialect that counts them by one; raise UsageError for others."""
        if step is None:
            raise UsageError(f"{dialect} numbers its versions", culprit="--step", remedy="add --step N")
        if step < 1 or base_step not in (None, step - 1):
            raise UsageError(f"a version of {dialect} is one more than its base's, and 1 or more", culprit="--step")
        return cls(step, step - 1)


@dataclass(frozen=True)
class WrittenPatch:
    """What was written: names of the changed tensors, and the bytes of the files of weights."""

    changed: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class ForeignDialect:
    """A row of `table.DIALECTS`.

    Attributes:
        key: its name in a call.
        name: what messages call it.
        recognize: returns whether a file or folder is of it, from headers and JSON.
        open: opens it, or raises the InputError that says why it is not read.
        write: writes pairs of tensors to a path with the dialect's own options; None if it is not written.
        entry: a pattern for the name of a version's folder or file, with a group `number`; None if it has no versions.
    """

    key: str
    name: str
    recognize: Callable[[Path], bool]
    open: Callable[[Path], ForeignPatch]
    write: Callable[..., WrittenPatch] | None = None
    entry: str | None = None
