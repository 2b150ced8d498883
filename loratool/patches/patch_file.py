"""Read and write a patch: the file of the differences between two models.

It is an indexed file (`files.containers.indexed_file`) with the first line `loratool patch 1`.

    payload    for each span, in the order of `spans.spans_of`: its body, then what the way back needs beside it; then
               the files of adapters
    blobs      the table; the frames of the target's files and, if the way back needs them, of the base's; texts of
               side files; all but the table are compressed by bzip2
    index      `version`
               `bodies`: the keys of the bodies (`bodies.table.BODIES`) that the table counts
               `table`: a place
               `target`, `base`: `digest`, `file` (whether the model is one file), `files` ({name, nbytes, head, frame,
               frame_bytes and, of a torch file, tensors}; null if they are the target's, or not known)
               `cast`: a tensor -> the base's type, for those of another type than the target's
               `renamed`: a tensor -> the base's name of the same bytes, whose own name the target does not have
               `new`: the target's tensors that are not predicted from the base; `removed`: how many it lacks
               `adapters`: those whose merge predicts the spans: [weight, [[module, weight], ...], {file: [length,
               sha256]}] each; `arithmetic`: of that merge
               `reversible`: whether the base can be made of the target
               `side`: a side file of the target -> [sha256, null] if the base has the same, else [sha256, place,
               bytes]; `base_side`: the same of those of the base that the target has not, or not so

A row of the table has 88 bytes: the number of the body, the length of the body and of what the way back needs (u64
each, 2^64 - 1 for the latter if there is no way back), and a hash each of what the span is predicted from and of the
span. A hash is the sha256 of the hashes of the span's pieces, one after the other, or 32 zeros where nothing
predicts the span.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..adapters.formats.peft_config import CONFIG_NAME
from ..durable.fileio import copy_range, file_length, open_for_reading, sha256_range, write_at
from ..durable.journal import StoredBytes
from ..errors import InputError
from ..files.containers.indexed_file import (
    MOST_BLOBS,
    FileKind,
    IndexedFile,
    are_hashes,
    is_count,
    is_number,
    is_place,
    packer,
    require,
    write_end,
)
from ..files.digest import PIECE
from ..files.dtypes import BLOCK_TYPES, DTYPES, FLOATS, TensorSpec
from ..files.folder.model_folder import INDEX_NAMES, PICKLES
from ..files.folder.side_files import CARD, PATCH_MARK, side_row
from ..numerics.merge import ARITHMETIC_VERSION
from .bodies.table import BODIES
from .model_files import ModelFiles
from .spans import spans_of

PATCH = FileKind(
    mark=PATCH_MARK,
    version=1,
    end=b"lorapatc",
    noun="a patch of loratool",
    remedy="copy it again, or make it again with `loratool patch`",
    other_version="use the loratool that made it",
)

ROW = struct.Struct("<QQQ32s32s")

ONE_WAY = (1 << 64) - 1  # the length of what the way back needs, where there is none

LITTLE = 1 << 20  # bytes of what the way back needs that are always kept

NOTHING = bytes(32)  # the hash of what predicts a span, where nothing does

MOST_SIDE = 1 << 28  # bytes of a side file

SAME = "same"  # the body that has no bytes


@dataclass(frozen=True)
class CodedSpan:
    """The result of coding a span.

    Attributes:
        body: a key of BODIES.
        data: its bytes; `StoredBytes` once they are in the journal.
        back: what the way back needs beside them; None without a way back.
        source_hashes, hashes: of the pieces of what predicts it, and of its own, in hexadecimal.
        changed: of each piece, how many numbers differ from the prediction.
    """

    body: str
    data: Any
    back: Any
    source_hashes: tuple[str, ...]
    hashes: tuple[str, ...]
    changed: tuple[int, ...]


@dataclass(frozen=True)
class AttachedAdapter:
    """An adapter whose files a patch has.

    Attributes:
        files: name -> the file to copy.
        places: name -> its first byte in the patch, and its length.
    """

    weight: float
    module_weights: tuple[tuple[str, float], ...]
    files: Mapping[str, Path] = field(default_factory=dict)
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class SideFile:
    """A side file: its hash and, unless it is the same on the other side, its content."""

    sha256: str
    content: bytes | None

    @classmethod
    def of(cls, data: bytes, known: bool) -> SideFile:
        return cls(hashlib.sha256(data).hexdigest(), None if known else data)


@dataclass(frozen=True)
class SpanRow:
    """A row of the table, and where its bytes are."""

    body: str
    offset: int
    length: int
    back: int | None  # the length of what the way back needs, after the body
    source_hash: bytes
    hash: bytes


def span_hash(hashes: Iterable[str]) -> bytes:
    """Return a span's hash from those of its pieces."""
    return hashlib.sha256(bytes.fromhex("".join(hashes))).digest()


@dataclass(frozen=True)
class PatchContent:
    """What a patch says, but for its spans.

    Attributes:
        base, target: the files of both models; None for a base that a patch cannot make again.
        base_digest, digest: theirs (`files.digest`).
        cast, renamed, new, removed: as in the index.
        side, base_side: side files by name.
        adapters: those whose merge predicts the spans.
    """

    base: ModelFiles | None
    target: ModelFiles
    base_digest: str
    digest: str
    cast: Mapping[str, str]
    renamed: Mapping[str, str]
    new: tuple[str, ...]
    removed: int
    side: Mapping[str, SideFile]
    base_side: Mapping[str, SideFile]
    adapters: tuple[AttachedAdapter, ...] = ()


def write_patch(target: BinaryIO, content: PatchContent, spans: Iterable[CodedSpan]) -> tuple[int, bool]:
    """Write a patch, and return its size and whether it has a way back.

    There is a way back if the target has the base's tensors with their types, and what the way back needs beside the
    bodies is at most a tenth of them, but for LITTLE bytes.

    Args:
        spans: in the order of `spans_of`, with their data in a journal.
    """
    coded = list(spans)
    keys = sorted({each.body for each in coded})
    numbers = {key: number for number, key in enumerate(keys)}
    bodies = sum(size_of(each.data) for each in coded)
    back = [None if each.back is None else size_of(each.back) for each in coded]
    reversible = content.base is not None and None not in back
    reversible = reversible and 10 * (sum(map(int, filter(None, back))) - LITTLE) <= bodies
    write_at(target, memoryview(PATCH.first_line), 0)
    position, rows = len(PATCH.first_line), bytearray()
    for each, length in zip(coded, back, strict=True):
        position = _put(target, position, each.data)
        if reversible:
            position = _put(target, position, each.back)
        source = span_hash(each.source_hashes) if each.source_hashes else NOTHING
        lengths = size_of(each.data), length if reversible and length is not None else ONE_WAY
        rows += ROW.pack(numbers[each.body], *lengths, source, span_hash(each.hashes))
    adapters = []
    for adapter in content.adapters:
        files = {}
        for name, path in sorted(adapter.files.items()):
            with open_for_reading(path) as file:
                length = file_length(file)
                copy_range(file, 0, target, position, length)
                files[name] = [length, sha256_range(file, 0, length)]
            position += length
        adapters.append([adapter.weight, [list(each) for each in adapter.module_weights], files])
    index: dict[str, Any] = {
        "adapters": adapters,
        "arithmetic": ARITHMETIC_VERSION if adapters else None,
        "version": PATCH.version,
        "bodies": keys,
        "table": bytes(rows),
        "target": _model_entry(content.target, content.digest),
        "base": _model_entry(content.base if reversible else None, content.base_digest),
        "cast": dict(sorted(content.cast.items())),
        "renamed": dict(sorted(content.renamed.items())),
        "new": sorted(content.new),
        "removed": content.removed,
        "reversible": reversible,
        "side": _side_entries(content.side),
        "base_side": _side_entries(content.base_side) if reversible else {},
    }
    if content.base == content.target:
        index["base"]["files"] = None
    return write_end(target, position, index, _blobs(index), PATCH), reversible


def size_of(data: bytes | StoredBytes) -> int:
    return data.nbytes if isinstance(data, StoredBytes) else len(data)


def _put(target: BinaryIO, position: int, data: bytes | StoredBytes) -> int:
    if isinstance(data, StoredBytes):
        copy_range(data.file, data.offset, target, position, data.nbytes)
    else:
        write_at(target, memoryview(data), position)
    return position + size_of(data)


def _model_entry(files: ModelFiles | None, digest: str) -> dict[str, Any]:
    if files is None:
        return {"digest": digest, "file": False, "files": None}
    return {"digest": digest, "file": files.is_file, "files": [file.entry() for file in files.files]}


def _side_entries(side: Mapping[str, SideFile]) -> dict[str, list[Any]]:
    return {
        name: [each.sha256, None]
        if each.content is None
        else [each.sha256, packer().compress(each.content), len(each.content)]
        for name, each in sorted(side.items())
    }


def _blobs(index: dict[str, Any]) -> list[tuple[Any, Any]]:
    blobs: list[tuple[Any, Any]] = [(index, "table")]
    for model in ("target", "base"):
        blobs += [(entry, "frame") for entry in index[model]["files"] or ()]
    for side in ("side", "base_side"):
        blobs += [(entry, 1) for _, entry in sorted(index[side].items()) if entry[1] is not None]
    return blobs


class PatchFile(IndexedFile):
    """A patch; opening it reads and checks everything but the bodies.

    Attributes:
        target: the files of the model that it makes.
        base: the files of the base; None if the patch does not have them.
        digest, base_digest: of both.
        cast, renamed, new, reversible: as in the index.
        base_specs: of the base's tensors that predict spans, sorted by name.
        side, base_side: side files of the target, and of the base where they differ, by name.
        spans, base_spans: of the target, with its names and with the base's.
        adapters, arithmetic: those whose merge predicts the spans, and the version of that; None without adapters.

    Raises:
        InputError: the file is damaged, forged or of another version.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, PATCH)
        with self.checked():
            self._check()

    def _check(self) -> None:
        index = self.index
        bodies, target, base = index["bodies"], index["target"], index["base"]
        for key in bodies:
            if key not in BODIES:
                what = f"has numbers in a way that this loratool does not know ({key!r})"
                raise InputError(what, culprit=str(self.path), remedy=PATCH.other_version)
        require(are_hashes([target["digest"], base["digest"]], 2), "its digests")
        self.digest, self.base_digest = target["digest"], base["digest"]
        self.reversible = index["reversible"]
        require(type(self.reversible) is bool and is_count(index["removed"]), "its way back")
        table = self.blob(index["table"])
        self.target = ModelFiles.read(target["files"], target["file"], self)
        self.base: ModelFiles | None = None
        if base["files"] is not None:
            self.base = ModelFiles.read(base["files"], base["file"], self)
        elif self.reversible:
            self.base = self.target
        specs = self.target.specs
        self.cast, self.new = index["cast"], tuple(index["new"])
        for name, source in self.cast.items():
            require(name in specs and source in FLOATS and specs[name].dtype in FLOATS, f"{name}: its former type")
        require(len({*self.new} & specs.keys()) == len(self.new), "a new tensor that the target does not have")
        require(not self.cast.keys() & {*self.new}, "a tensor that is new and is not")
        require(not self.reversible or not (self.cast or self.new), "a way back from other tensors")
        self.renamed = index["renamed"]
        new = {*self.new}
        require(specs.keys() - new - self.cast.keys() >= self.renamed.keys(), "a renamed tensor")
        require(not specs.keys() & {*self.renamed.values()}, "the former name of a tensor, which another has")
        named = {
            self.renamed.get(name, name): TensorSpec(self.cast.get(name, spec.dtype), spec.shape)
            for name, spec in specs.items()
            if name not in new
        }
        require(len(named) == len(specs) - len(self.new), "two tensors of one former name")
        self.base_specs = {name: named[name] for name in sorted(named, key=str.encode)}
        if self.reversible and self.base:
            require(self.base.specs == self.base_specs, "a way back to other tensors")
        self.side, self.base_side = (self._read_side(index[key]) for key in ("side", "base_side"))
        pieces = sum(spec.nbytes // PIECE for spec in specs.values())  # each is a span: no header makes a list of more
        require(pieces * ROW.size <= len(table), "its table is not of its spans")
        self.spans = spans_of(specs, {**self.cast, **dict.fromkeys(self.new, "")})
        self.base_spans = [span.named(self.renamed) for span in self.spans]
        self.rows, end = self._read_rows(table, bodies)
        self.adapters = self._read_adapters(index["adapters"], end)
        self.arithmetic = index["arithmetic"]
        has_version = is_count(self.arithmetic) if self.adapters else self.arithmetic is None
        require(has_version, "the version of its arithmetic")
        require(not (self.reversible and self.adapters), "a way back without adapters")

    def tensor_sizes(self) -> dict[str, float]:
        """Return how many bytes the patch has of each tensor that it changes: its share of the span, by its bytes.

        Of a span with several tensors these are all, if one of them changes.
        """
        sizes = dict[str, float]()
        for span, row in zip(self.spans, self.rows, strict=True):
            for piece in span.pieces if row.source_hash != row.hash else ():
                size = (row.length + (row.back or 0)) * piece.length / span.nbytes
                sizes[piece.tensor] = sizes.get(piece.tensor, 0.0) + size
        return sizes

    def _read_adapters(self, entries: Sequence[Any], position: int) -> tuple[AttachedAdapter, ...]:
        """Read the entries of adapters, whose files begin at a byte, and check that the file has nothing else."""
        adapters = []
        for weight, modules, files in entries:
            require(is_number(weight), "an adapter's weight")
            require(all(isinstance(name, str) and is_number(each) for name, each in modules), "an adapter's weights")
            places = {}
            for name, (length, sha256) in files.items():
                known = name == CONFIG_NAME or name.endswith((".safetensors", ".gguf", *PICKLES))
                require(is_place(name) and "/" not in name and known, f"{name!r} is no file of an adapter")
                require(is_count(length) and are_hashes([sha256], 1) and position + length <= self.nbytes, name)
                require(sha256_range(self.file, position, length) == sha256, f"{name} does not match its hash")
                places[name] = position, length
                position += length
            require(len(places.keys() - {CONFIG_NAME}) == 1, "an adapter of no file, or of several")
            adapters.append(AttachedAdapter(weight, tuple((name, each) for name, each in modules), {}, places))
        self.require_tiled(position - len(PATCH.first_line))
        return tuple(adapters)

    def _read_rows(self, table: bytes, bodies: list[str]) -> tuple[list[SpanRow], int]:
        """Return the rows of the table, and the byte after the last body."""
        require(len(table) == len(self.spans) * ROW.size, "its table is not of its spans")
        rows, position = [], len(PATCH.first_line)
        for span, (number, length, back, source, own) in zip(self.spans, ROW.iter_unpack(table), strict=True):
            require(number < len(bodies), "a body without a name")
            body = bodies[number]
            require(BODIES[body].takes(coded_type(span.dtype)), f"a body of {body} for {span.dtype}")
            require((source == NOTHING) is not bool(span.source), "a span without a source, or with one")
            require((back == ONE_WAY) is not self.reversible, "a span without a way back")
            require(bool(span.source) or body == UNPREDICTED, "a span that nothing predicts")
            rows.append(SpanRow(body, position, length, None if back == ONE_WAY else back, source, own))
            position += length + (0 if back == ONE_WAY else back)
            require(position <= self.nbytes, "its payload is longer than the file")
        return rows, position

    def _read_side(self, entries: Mapping[str, Any]) -> dict[str, SideFile]:
        found = {}
        names = {file.name for model in (self.target, self.base) if model for file in model.files}
        for name, (sha256, place, *size) in entries.items():
            fits = name not in names and (is_side_file if place is None else may_bring)(name)
            require(fits, f"{name!r} is not a side file that a patch can have")
            require(are_hashes([sha256], 1), f"{name}: its hash")
            content = None
            if place is not None:
                content = self.packed_blob(name, place, size[0], MOST_SIDE)
                require(hashlib.sha256(content).hexdigest() == sha256, f"{name} does not match its hash")
            found[name] = SideFile(sha256, content)
        return found


def require_room(
    models: Iterable[ModelFiles | None], sides: Iterable[Mapping[str, SideFile]], spans: int, culprit: str
) -> None:
    """Raise InputError if nobody could read a patch of these files, of which so much is beside the tensors."""
    frames = [file.frame for model in models if model for file in model.files]
    contents = [each.content for side in sides for each in side.values() if each.content is not None]
    nbytes = sum(len(each) + len(each) // 64 + 1024 for each in [*frames, *contents])  # bzip2 may add a hundredth
    if nbytes + spans * ROW.size > MOST_BLOBS or any(len(each) > MOST_SIDE for each in contents):
        what = f"has {nbytes:,} bytes beside its tensors, more than a patch can hold"
        raise InputError(what, culprit=culprit, remedy="take large files that are no weights out of its folder")


UNPREDICTED = "bytes"  # the body that needs no prediction


def coded_type(dtype: str) -> str:
    """Return the type as whose numbers a tensor is coded: blocks and numbers of less than a byte are bytes."""
    return "U8" if dtype in BLOCK_TYPES or DTYPES[dtype] < 8 else dtype


def is_side_file(name: str) -> bool:
    """Return whether a file of this name goes with a model: one that is copied, a card, or an index of weights."""
    folder, _, last = name.rpartition("/")
    if not is_place(name) or (folder and side_row(f"{folder}/")):
        return False
    row = side_row(name) or side_row(last)  # a component's files have no folder in the table
    return name == CARD or last in INDEX_NAMES or bool(row and not row.left)


def may_bring(name: str) -> bool:
    """Return whether a patch may bring the content of a side file: neither code nor a pickle."""
    is_code = name.lower().endswith((".py", *PICKLES))
    return is_side_file(name) and not is_code
