"""Read the base of a merge from the merged model and its undo file, as if its weights files were there.

A tensor that the merge changed is restored where it is read, record by record. The base is never on the disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..adapters.adapter import Adapter
from ..durable.fileio import read_into
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.containers.layouts import FileLayout
from ..files.containers.safetensors_file import TensorFile
from ..files.digest import digest_of
from ..files.tensor_ref import TensorRef
from ..files.weights_file import PlacedTensors, WeightsFile
from ..numerics.arrays import Numbers
from ..numerics.forms import FORMS
from ..numerics.workspace import Workspace
from ..undo.checks import prefix_of
from ..undo.reader import UndoFile
from ..undo.records import EDITED
from ..undo.writer import read_placements
from .apply import restore_tensor
from .digests import TensorHashes
from .rewrite import ChangedTensor, CopiedRows, RowRange, cast_in_blocks
from .segment import UpdateLoader

MakeTensor = Callable[[str], ChangedTensor]  # the name of a changed tensor -> how it is restored


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor that the merge changed: `part` restores them, and None means that it did not change them."""

    start: int
    stop: int
    part: RowRange | CopiedRows | None


class _Reader:
    """What a thread keeps between two reads: the last tensor, the last record that was not read whole, and buffers."""

    def __init__(self) -> None:
        self.name = ""
        self.columns = 0
        self.rows: list[_Rows] = []
        self.block: tuple[int, Numbers] | None = None  # number among `rows`
        self.work, self.merged = Workspace(), Workspace()


class RestoredTensors:
    """The stored tensors of a base, read from what a merge made of them.

    Args:
        merged: the open merged model.
        make: returns how a changed tensor is restored.
        changed: the tensors that are restored, by default those that the undo file names.
    """

    def __init__(
        self, merged: Checkpoint, undo: UndoFile, make: MakeTensor, changed: Collection[str] | None = None
    ) -> None:
        self.merged, self.undo, self._make = merged, undo, make
        self._changed = undo.index["tensors"].keys() if changed is None else changed
        self._local = threading.local()

    def is_changed(self, name: str) -> bool:
        """Return whether the merge changed a tensor of the base."""
        return name in self._changed

    def is_computed(self, name: str) -> bool:
        """Return whether rows of a tensor are in no file."""
        return self.is_changed(name) and self.undo.specs[name].size > 0 and self._kept(name) is None

    def _kept(self, name: str) -> int | None:
        """Return the first byte in the undo file of a tensor that is there unchanged, as no record can restore it."""
        first, offset = self.undo.copied_rows(name) or (1, 0)
        return None if first else offset

    def extents(self, name: str) -> Iterator[tuple[BinaryIO, int, int]]:
        """Yield the places of the bytes of a tensor that is not computed."""
        kept = self._kept(name) if self.is_changed(name) else None
        if kept is not None:
            yield self.undo.file, kept, self.undo.specs[name].nbytes
        elif self.undo.specs[name].size:
            yield from self.merged.shard_of[name].extents(name)

    def read(self, name: str, first: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from `first` on.

        Raises:
            InputError: the rows in the merged model are not those that the merge wrote.
        """
        if not self.is_changed(name):
            self.merged.shard_of[name].read_bytes(name, first, out)
            return
        spec, reader = self.undo.specs[name], self._reader(name)
        width = reader.columns * spec.nbytes // max(1, spec.size)
        for number, rows in enumerate(reader.rows):
            begin, end = max(first, rows.start * width), min(first + len(out), rows.stop * width)
            if begin < end:
                self._fill(reader, number, begin - rows.start * width, out[begin - first : end - first])

    def _fill(self, reader: _Reader, number: int, first: int, out: memoryview) -> None:
        """Fill `out` with the bytes of one of the reader's rows, from `first` on."""
        rows, spec = reader.rows[number], self.undo.specs[reader.name]
        width = reader.columns * spec.nbytes // spec.size
        if rows.part is None:
            self.merged.shard_of[reader.name].read_bytes(reader.name, rows.start * width + first, out)
            return
        if isinstance(rows.part, CopiedRows):
            read_into(rows.part.file, out, rows.part.offset + first)
            return
        form, shape = FORMS[spec.dtype], (rows.stop - rows.start, reader.columns)
        bits = np.frombuffer(out, np.uint8)
        if len(out) == shape[0] * width and bits.ctypes.data % form.itemsize == 0:
            self._restore(reader, rows.part, Numbers(bits.view(form.bits_type).reshape(shape), form))
            return
        if reader.block is None or reader.block[0] != number:
            reader.block = None  # before the next takes memory
            block = Numbers.empty(form, *shape)
            self._restore(reader, rows.part, block)
            reader.block = number, block
        bits[...] = reader.block[1].bits.reshape(-1).view(np.uint8)[first : first + len(out)]

    def _restore(self, reader: _Reader, part: RowRange, out: Numbers) -> None:
        merged = reader.merged.numbers("merged", out.form, *out.shape)
        file = self.merged.shard_of[reader.name]
        file.read_numbers(reader.name, part.start * reader.columns, merged.bits)
        part.prepare(part.start, part.stop)(merged, 0, out, reader.work)

    def _reader(self, name: str) -> _Reader:
        """Return this thread's reader of a tensor."""
        reader: _Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = self._local.reader = _Reader()
        if reader.name != name:
            reader.block = None
            changed = self._make(name)
            reader.name, reader.rows = name, list(_all_rows(changed))
            reader.columns = self.undo.specs[name].size // max(1, changed.rows)
        return reader

    def by_records(self, name: str) -> ChangedTensor:
        """Return a tensor that is restored and nothing else, in blocks of its records."""
        changed = self._make(name)
        return cast_in_blocks(changed.rows, [(rows.start, rows.stop) for rows in _all_rows(changed)])


def _all_rows(changed: ChangedTensor) -> Iterator[_Rows]:
    done = 0
    for part in changed.ranges():
        if done < part.start:
            yield _Rows(done, part.start, None)
        yield _Rows(part.start, part.stop, part)
        done = part.stop
    if done < changed.rows:
        yield _Rows(done, changed.rows, None)


class RestoredFile(TensorFile):
    """A safetensors file of the base that is not there; its header is the undo file's.

    Args:
        path: for errors; its last part is the file's name.
        component: the prefix of its tensors in the undo file.
    """

    def __init__(self, tensors: RestoredTensors, path: Path, layout: FileLayout, component: str) -> None:
        self.path, self.nbytes, self._tensors, self._component = path, layout.nbytes, tensors, component
        self._header, self.data_start = layout.head[8:], len(layout.head)
        self.specs, self.begin, self.metadata = dict(layout.specs), dict(layout.begin), dict(layout.metadata)
        stored = (tensors.merged.shard_of.get(component + name) for name in layout.specs)
        self._members = tuple(dict.fromkeys(filter(None, stored))) or tensors.merged.shards[:1]
        self.file, self.stamp = self._members[0].file, self._members[0].stamp

    def _full(self, name: str) -> str:
        """Return a tensor's name in the undo file."""
        return name if self.prefix else self._component + name

    @property
    def members(self) -> Sequence[WeightsFile]:
        return self._members

    def close(self) -> None:
        """Do nothing: the merged model's files are closed by whoever opened them."""

    def is_computed(self, name: str) -> bool:
        return self._tensors.is_computed(self._full(name))

    def extents(self, name: str) -> Iterator[tuple[BinaryIO, int, int]]:
        yield from self._tensors.extents(self._full(name))

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        self._tensors.read(self._full(name), first, out)


class RestoredRows(PlacedTensors):
    """A weights file of a merged model whose changed tensors are read as they are restored, in the same places."""

    def __init__(self, tensors: RestoredTensors, file: WeightsFile) -> None:
        super().__init__(file.path, file.file, file.specs, file.begin)
        self._tensors = tensors

    def is_computed(self, name: str) -> bool:
        return self._tensors.is_computed(name)

    def read_bytes(self, name: str, first: int, out: memoryview) -> None:
        self._tensors.read(name, first, out)


@dataclass(frozen=True)
class RestoredBase:
    """The base of a merge, as it is read from the merged model.

    Attributes:
        checkpoint: the base. Its files are in no folder but for the small ones, which are in a temporary one.
        tensors: what its files read.
        earlier: the undo files that it had itself.
    """

    checkpoint: Checkpoint
    tensors: RestoredTensors
    earlier: tuple[Path, ...]

    @property
    def undo(self) -> UndoFile:
        return self.tensors.undo

    @property
    def to_hash(self) -> dict[str, WeightsFile]:
        """Return the tensors of the merged model, whose hashes prove what is read, and the file of each."""
        merged = self.tensors.merged
        return {name: merged.shard_of[name] for name in self.undo.merged_specs}

    def prove(self, hashes: TensorHashes) -> None:
        """Compare the hashes of the merged model, and put the base's, which then are known, in their place.

        Raises:
            InputError: a tensor is not what the merge wrote.
        """
        for name, found in hashes.of_read.items():
            if found != self.undo.merged_hashes(name):
                raise InputError(EDITED, culprit=name)
        hashes.of_read.clear()
        hashes.of_read.update((name, self.undo.base_hashes(name)) for name in self.undo.specs)

    def merged_digest(self) -> str:
        """Return the digest of the merged model."""
        return digest_of((name, *each) for name, each in sorted(self.undo.merged_tensors().items()))

    def rest(self, sources: Mapping[str, TensorRef], changed: Mapping[str, ChangedTensor]) -> dict[str, ChangedTensor]:
        """Return the tensors of an output that are restored and nothing else, as `rewrite` takes them.

        Args:
            sources: the sources of the output's tensors.
            changed: the tensors that it changes otherwise.
        """
        found = {}
        for name, source in sources.items():
            whole = isinstance(source.file, RestoredFile) and not source.parts and not source.span
            if whole and name not in changed and self.tensors.is_computed(source.name):
                found[name] = self.tensors.by_records(source.name)
        return found


def restored_tensors(merged: Checkpoint, undo: UndoFile, adapters: Sequence[Adapter]) -> RestoredTensors:
    """Return the tensors of a merge's base.

    Args:
        merged: the open merged model.
        adapters: of the merge, in the order of its undo file.
    """
    load = UpdateLoader()

    def make(name: str) -> ChangedTensor:
        spec = undo.specs[name]
        return restore_tensor(spec, undo, name, read_placements(undo.index, name, spec, adapters), load)

    return RestoredTensors(merged, undo, make)


def restored_files(tensors: RestoredTensors, folder: Path) -> dict[str, RestoredFile]:
    """Return the weights files of a merge's base by their names in the undo file; all are of safetensors.

    Args:
        folder: the one that errors name.
    """
    files = {}
    for shard, layout in zip(tensors.undo.index["shards"], tensors.undo.layouts, strict=True):
        assert layout
        files[shard["name"]] = RestoredFile(tensors, folder / shard["name"], layout, prefix_of(shard["name"]))
    return files
