"""Describe the files of a model apart from its tensors' bytes, so that the same files can be written again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..durable.fileio import read_into
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.containers.gguf_file import GGUF, MAGIC
from ..files.containers.indexed_file import IndexedFile, is_count, is_place, packer, require
from ..files.containers.layouts import read_layout
from ..files.digest import tensors_of
from ..files.dtypes import BLOCK_TYPES, DTYPES, TensorSpec
from ..files.output.output import CONTAINERS
from ..files.weights_file import WeightsFile

MOST_FRAME = 1 << 28  # bytes of a file that are of no tensor


@dataclass(frozen=True)
class ModelFile:
    """A weights file without its tensors' bytes.

    Attributes:
        name: relative to the model's folder.
        nbytes: of the file.
        head: the length of the header from which the places of the tensors can be read; 0 for a torch file.
        frame: all bytes of the file that are of no tensor, in their order.
        specs, begin: of the tensors, by name with the prefix of a pipeline's component.
    """

    name: str
    nbytes: int
    head: int
    frame: bytes
    specs: Mapping[str, TensorSpec]
    begin: Mapping[str, int]

    @property
    def container(self) -> str:
        """Return its container, a key of CONTAINERS."""
        return "torch" if not self.head else GGUF if self.frame.startswith(MAGIC) else "safetensors"

    def storage(self, name: str) -> int:
        return self.begin[name]

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield the places of the frame's bytes in the file: first byte, length."""
        done = 0
        for first, last in sorted({(begin, begin + self.specs[name].nbytes) for name, begin in self.begin.items()}):
            if first > done:
                yield done, first - done
            done = max(done, last)
        if self.nbytes > done:
            yield done, self.nbytes - done

    @classmethod
    def of(cls, file: WeightsFile) -> ModelFile:
        """Describe an open file.

        Raises:
            InputError: its tensors are not in one piece each, or it has too much beside them.
        """
        if file.scattered or len(file.members) != 1 or any(map(file.is_computed, file.specs)):
            what = "holds tensors in parts, as training runs save them, whose files a patch cannot make again"
            raise InputError(what, culprit=str(file.path), remedy="convert it to safetensors first")
        head, specs, begin = 0, dict(file.specs), dict(file.begin)
        if file.header is not None:
            layout = read_layout(file.header, file.path)
            head = len(layout.head)
            specs = {file.prefix + name: spec for name, spec in layout.specs.items()}
            begin = {file.prefix + name: first for name, first in layout.begin.items()}
        described = cls(file.place, file.nbytes, head, b"", specs, begin)
        gaps = list(described.gaps())
        size = sum(length for _, length in gaps)
        if size > MOST_FRAME:
            what = f"has {size:,} bytes beside its tensors, more than a patch can hold"
            raise InputError(what, culprit=str(file.path), remedy="convert it to safetensors first")
        frame = bytearray(size)
        done = 0
        for first, length in gaps:
            read_into(file.file, memoryview(frame)[done : done + length], first)
            done += length
        return cls(file.place, file.nbytes, head, bytes(frame), specs, begin)

    def entry(self) -> dict[str, Any]:
        """Return the file's entry in an index, with the compressed frame where its place will be."""
        entry = {"name": self.name, "nbytes": self.nbytes, "frame": packer().compress(self.frame)}
        entry |= {"frame_bytes": len(self.frame), "head": self.head}
        if not self.head:
            rows = {name: [spec.dtype, list(spec.shape), self.begin[name]] for name, spec in self.specs.items()}
            entry["tensors"] = rows
        return entry

    @classmethod
    def read(cls, entry: Mapping[str, Any], opened: IndexedFile) -> ModelFile:
        """Read a file's entry in the index of an opened patch.

        Raises:
            ValueError: no model has such a file.
        """
        name, nbytes, head = entry["name"], entry["nbytes"], entry["head"]
        fits = isinstance(name, str) and is_place(name) and is_count(nbytes) and is_count(head)
        require(fits, f"{name!r} is no file of a model")
        frame = opened.packed_blob(f"the frame of {name}", entry["frame"], entry["frame_bytes"], MOST_FRAME)
        folder, slash, _ = name.rpartition("/")
        prefix = folder + slash
        if head:
            require(head <= len(frame), f"{name}: its header is longer than its frame")
            # `FileLayout.head` of a safetensors file begins with the length, `WeightsFile.header` does not
            start = 0 if frame.startswith(MAGIC) else 8
            layout = read_layout(frame[start:head], opened.path)
            require(layout.head == frame[:head], f"{name}: its header")
            specs = {prefix + key: spec for key, spec in layout.specs.items()}
            begin = {prefix + key: first for key, first in layout.begin.items()}
        else:
            specs, begin = {}, {}
            for key, (dtype, shape, first) in entry["tensors"].items():
                known = dtype in DTYPES or dtype in BLOCK_TYPES
                require(known and all(map(is_count, [*shape, first])), f"{key}: its type or place")
                specs[key], begin[key] = TensorSpec(dtype, tuple(shape)), first
        file = cls(name, nbytes, head, frame, specs, begin)
        file.require_apart()
        return file

    def require_apart(self) -> None:
        """Raise ValueError unless tensors and frame fill the file; tensors may share all of their bytes, or none."""
        done = 0
        for first, last in sorted({(begin, begin + self.specs[name].nbytes) for name, begin in self.begin.items()}):
            if first == last:
                continue
            require(done <= first and last <= self.nbytes, f"{self.name}: its tensors overlap, or are beyond its end")
            done = last
        require(sum(length for _, length in self.gaps()) == len(self.frame), f"{self.name}: its frame is incomplete")


@dataclass(frozen=True)
class ModelFiles:
    """All weights files of a model, without its tensors' bytes.

    Attributes:
        is_file: the model is one file, not a folder.
    """

    files: tuple[ModelFile, ...]
    is_file: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> ModelFiles:
        """Describe the files of an open model.

        Raises:
            InputError: a patch cannot make one of them again.
        """
        files = cls(tuple(ModelFile.of(shard) for shard in checkpoint.shards), checkpoint.given_as_file)
        for file, shard in zip(files.files, checkpoint.shards, strict=True):
            if not files.has_name(file):
                what, endings = f"is a {file.container} file by another name", " or ".join(CONTAINERS[file.container])
                raise InputError(what, culprit=str(shard.path), remedy=f"give it a name that ends in {endings}")
        return files

    def has_name(self, file: ModelFile) -> bool:
        """Return whether a file has an ending of its container; that of a model of one file is for the reader to say.

        So no file of a folder has a name by which other programs would run it.
        """
        return self.is_file or file.name.endswith(CONTAINERS[file.container])

    @classmethod
    def read(cls, entries: Sequence[Mapping[str, Any]], is_file: object, opened: IndexedFile) -> ModelFiles:
        """Read the entries of an index.

        Raises:
            ValueError: no model has such files.
        """
        files = tuple(ModelFile.read(entry, opened) for entry in entries)
        names = [file.name for file in files]
        require(type(is_file) is bool and 0 < len(names) == len(set(names)), "a file of the model twice, or none")
        require(not is_file or (len(names) == 1 and "/" not in names[0]), "a model of one file, and several")
        tensors = [name for file in files for name in file.specs]
        require(len(tensors) == len(set(tensors)), "a tensor is in two files")
        model = cls(files, bool(is_file))
        strange = next((file.name for file in files if not model.has_name(file)), None)
        require(strange is None, f"{strange!r} is no name of weights")
        return model

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors that count in the digest, sorted by name: of those that share their bytes, the first."""
        return {name: file.specs[name] for name, file in tensors_of(self.files).items()}

    @cached_property
    def holder(self) -> dict[str, ModelFile]:
        """The file of each tensor of `specs`."""
        return tensors_of(self.files)


def file_path(root: Path, name: str, files: ModelFiles) -> Path:
    """Return the path of one of the files of a model that is at `root`."""
    return root if files.is_file else root / name
