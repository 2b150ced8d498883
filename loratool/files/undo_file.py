"""Read an undo file without trusting it: anybody can have written it, so all that is used later is checked first.

Refused is all that a merge cannot have written: records that do not tile their tensor or the file, a tensor without
an entry, sizes beyond the file's own, names of files that no merge edits. The hashes protect the rest. The layout is
described in `undo.writer`, which writes it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from ..errors import InputError, MachineError
from .codecs import find_stored
from .codecs.codec import Fault, Found, Parts, StoredTensor, StoredWeight
from .descriptors import kept_open
from .dtypes import TensorSpec
from .fileio import open_for_reading, read_into, sha256_range, sum_range
from .gguf_file import GGUF
from .layouts import FileLayout, read_layout
from .model_folder import INDEX_NAMES, PICKLES
from .quantized import QUANTIZERS
from .safetensors_file import memory_of, parse_json
from .sentence_transformers import DENSE
from .side_files import CARD, SMALL_TEXT, UNDO_MARK, is_of_tokenizer, matches
from .undo_checks import (
    ROWS,
    are_hashes,
    check_adapter,
    check_extents,
    check_placement,
    check_tiling,
    checked_spec,
    coded_tiling,
    is_count,
    prefix_of,
    record_rows,
    require,
    require_plain,
    spec_of,
    strange,
    tiling,
)
from .weights_file import WeightsFile

VERSION = 2

HASH_PART = 1 << 26  # bytes per hash, fixed by the layout

MAGIC, END = UNDO_MARK + f"{VERSION}\n".encode(), b"loraundo"

LAST_OF_VERSION_1 = "ad17cc1"  # the last commit that reads undo files of version 1

MOST_INDEX = 250_000_000  # bytes of memory, about, that an index may take: one of 80,000 changed tensors

MOST_BLOBS = 1 << 27  # bytes of headers and side files together

SMALL = 1 << 22  # bytes of an index that are parsed whatever they are

TRAILER = struct.Struct("<QQ32s8s")  # the index's offset, length and sha256, END

_WRONG = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error, EOFError)

_APPROXIMATE = "take the one that the merge wrote, or subtract and round with --approximate, which is not exact"


@dataclass(frozen=True)
class UnrecordedBytes:
    """Bytes of a merged tensor that are in no record."""

    tensor: str
    start: int  # in the tensor, in bytes
    length: int  # in bytes


@dataclass(frozen=True)
class Record:
    """The record of rows start:stop of a tensor.

    Attributes:
        at: its first byte in the undo file.
        length: in bytes.
        sha256: of the rows of W.
        sum: of the rows of W' as 64-bit words (`undo.records.word_sum`).
    """

    start: int
    stop: int
    at: int
    length: int
    sha256: str
    sum: int


def unrecorded(name: str, entry: Mapping[str, Any], records: Iterable[tuple[int, int]]) -> Iterator[UnrecordedBytes]:
    """Yield the bytes of a changed tensor that are in no record, at most HASH_PART at a time.

    Args:
        records: the rows of each record, as (start, stop).
    """
    spec, rows = spec_of(entry["spec"]), counted_rows(entry)
    if "recoded" in entry:  # the records tell codes, which need not lie row by row
        rows, records = 1, ()
    done = 0
    for start, stop in [*sorted(records), (rows, rows)]:
        first, last = (edge * (spec.nbytes // max(1, rows)) for edge in (done, start))
        yield from (UnrecordedBytes(name, at, min(HASH_PART, last - at)) for at in range(first, last, HASH_PART))
        done = stop


def is_readable(text: bytes, blobs: int) -> bool:
    """Return whether a reader takes an undo file with this index, and so many bytes of headers and side files."""
    return memory_of(text) <= MOST_INDEX and blobs <= MOST_BLOBS


def kept_tensors(weight: StoredWeight, entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the stored tensors of a coded weight that an undo file has unchanged."""
    return weight.tensors if entry["replaced"] else weight.tensors[1:]


class _Kept(WeightsFile):
    """Stored tensors that an undo file has unchanged."""

    def __init__(self, undo: UndoFile, specs: dict[str, TensorSpec], begin: dict[str, int]) -> None:
        self.path, self.file, self.specs, self.begin = undo.path, undo.file, specs, begin


def recoded_shape(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and columns of a weight that was rounded to codes."""
    size = prod(entry["recoded"]["shape"])
    return counted_rows(entry), size // max(1, counted_rows(entry))


def recoded_tiling(entry: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the runs of rows that its records must tile: all, split at each edge."""
    edges = {0, counted_rows(entry), *(edge for *_, start, stop, _, _ in entry["placements"] for edge in (start, stop))}
    return list(pairwise(sorted(edges)))


def counted_rows(entry: Mapping[str, Any]) -> int:
    """Return the number of rows that the records of a changed tensor count."""
    rows: int = entry["placements"][0][ROWS] if entry["placements"] else (*entry["spec"][1], 1)[0]
    return rows


def card_packer() -> ModuleType:
    """Return the module by which a model card is compressed.

    Raises:
        MachineError: this Python was built without it.
    """
    try:
        import bz2
    except ImportError as error:
        what = "this Python has no module bz2, by which an undo file has the base's model card"
        raise MachineError(what, remedy="take a Python that was built with libbz2") from error
    return bz2


class UndoFile:
    """An undo file, of which opening reads and checks only the index.

    Attributes:
        specs: the base's stored tensors.
        weights: the changed weights that it stores as codes.
        layouts: that of each of the base's shards; None for a torch file.
        side: the content of the base's side files by name.

    Raises:
        InputError: the file is damaged, forged or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: BinaryIO = kept_open(open_for_reading(path), partial(open_for_reading, path))
        try:
            self.index, end = self._read_index()
            self._check(end)
        except _WRONG as error:
            self.file.close()
            raise InputError(f"is cut off or damaged: {error}", culprit=str(path), remedy=_APPROXIMATE) from error
        except BaseException:
            self.file.close()
            raise

    def _read_index(self) -> tuple[dict[str, Any], int]:
        """Read the index, and return it with its first byte in the file."""
        size = os.fstat(self.file.fileno()).st_size
        start = self.bytes(0, min(size, len(MAGIC)))
        if start[:-2] != MAGIC[:-2] or size < len(MAGIC) + TRAILER.size:
            raise InputError("is no undo file", culprit=str(self.path))
        if start != MAGIC:
            self._refuse_version(start[-2:-1].decode(errors="replace"))
        at, length, digest, end = TRAILER.unpack(self.bytes(size - TRAILER.size, TRAILER.size))
        if end != END or at < len(MAGIC) or at + length + TRAILER.size != size:
            raise ValueError("its end is missing")
        require(2 * length <= MOST_INDEX, "its index is larger than any")
        text = self.bytes(at, length)
        require(hashlib.sha256(text).digest() == digest, "its index is another")
        if length > SMALL and text.count(b"[") + text.count(b"{") > length // 6:
            raise ValueError("its index is a pile of brackets")  # each of which takes the memory of a hundred
        index = parse_json(text, self.path, most=MOST_INDEX)
        if type(index["version"]) is not int or index["version"] != VERSION:
            self._refuse_version(index["version"])
        return index, at

    def _refuse_version(self, found: object) -> None:
        message, remedy = f"is an undo file of version {found}, not {VERSION}", "use the loratool that merged"
        if found == "1":
            message = "was written by loratool 0.1.0 (undo version 1)"
            remedy = f"unmerge it with that version (commit {LAST_OF_VERSION_1} is its last), then merge again"
        raise InputError(message, culprit=str(self.path), remedy=remedy)

    def _check(self, end: int) -> None:
        index = self.index
        self._blobs: list[tuple[int, int]] = []  # (first byte, length) of headers and side files
        self._held = 0  # bytes of these
        require(type(index["arithmetic"]) is int and type(index["file"]) is bool, "its arithmetic or file is none")
        for adapter in index["adapters"]:
            check_adapter(adapter)
        names = [shard["name"] for shard in index["shards"]]
        require(len(set(names)) == len(names) > 0, "it names no file of the base, or one twice")
        self._beside = Counter(prefix_of(name) for name in names)
        self.layouts: list[FileLayout | None] = []
        self.specs: dict[str, TensorSpec] = {}
        self._holder: dict[str, str] = {}
        self._metadata: dict[str, dict[str, str]] = {}  # of the files, by component
        for shard in index["shards"]:
            self._check_shard(shard)
        self.weights = self._find_weights()
        changed = {tensor for weight in self.weights.values() for tensor in weight.tensors} | index["tensors"].keys()
        untouched = {name for name, spec in self.specs.items() if spec.nbytes and name not in changed}
        require(index["untouched"].keys() == untouched, "it does not say of each tensor what became of it")
        for name, hashes in index["untouched"].items():
            require(are_hashes(hashes, -(-self.specs[name].nbytes // HASH_PART)), f"no hashes of {name}")
        extents = [place for name, entry in index["tensors"].items() for place in self._check_entry(name, entry)]
        self.side = {name: self._blob(place) for name, place in index["side"].items()}
        if "card" in index:
            self.side[CARD] = self._card(index["card"], index["card_bytes"])
        check_extents([*extents, *self._blobs], len(MAGIC), end)
        self._check_written()
        self._check_side()

    def _find_weights(self) -> dict[str, StoredWeight]:
        """Return the weights that the index says were stored as codes, found anew by the base's tensors."""
        entries = {name: entry for name, entry in self.index["tensors"].items() if "coded" in entry}
        found: dict[str, StoredWeight] = {}
        for prefix in {prefix_of(shard["name"]) for shard in self.index["shards"]} if entries else ():
            own = [e["coded"] | {"all": e["replaced"]} for n, e in entries.items() if n.startswith(prefix)]
            specs = {tensor: spec for tensor, spec in self.specs.items() if prefix_of(self._holder[tensor]) == prefix}
            kept = {
                tensor: place[0]
                for coded in own
                for tensor, place in zip(coded["tensors"][0 if coded["all"] else 1 :], coded["kept"], strict=True)
            }
            read = partial(self._read_kept, kept)
            metadata = self._metadata.get(prefix, {})
            found |= find_stored(Found(specs, self.index["declared"][prefix], metadata, read, prefix))[0]
        for name, entry in entries.items():
            coded = entry["coded"]
            fits = name in found and found[name].codec.key == coded["codec"]
            fits = fits and list(found[name].tensors) == coded["tensors"]
            require(fits, f"{name} was not stored as codes of {coded['codec']}")
            both = self.index["tensors"].keys() & set(found[name].tensors) - {name}
            require(not both, f"{name}: an entry of its own for a part of it")
        return {name: found[name] for name in entries}

    def _read_kept(self, kept: Mapping[str, int], name: str) -> bytes:
        if name not in kept:
            raise Fault(f"{name} is of a weight that the merge did not change")
        require(is_count(kept[name]), f"{name}: its place")
        return self.bytes(kept[name], self.specs[name].nbytes)

    def _blob(self, place: Sequence[Any]) -> bytes:
        """Read the bytes of a header or a side file."""
        at, length, digest = place
        fits = is_count(at) and is_count(length) and are_hashes([digest], 1)
        require(fits, "no place of a header or a side file")
        require(at + length <= os.fstat(self.file.fileno()).st_size, "a header or a side file ends behind the file")
        self._blobs.append((at, length))
        self._held += length  # before they are read: a thousand names could share one place
        require(self._held <= MOST_BLOBS, "its headers and side files are larger than any")
        data = self.bytes(at, length)
        require(hashlib.sha256(data).hexdigest() == digest, "a header or a side file is another")
        return data

    def _card(self, place: Sequence[Any], nbytes: int) -> bytes:
        """Read the base's model card, which is compressed."""
        require(is_count(nbytes) and nbytes <= SMALL_TEXT and CARD not in self.side, "its model card")
        unpacked, packed = card_packer().BZ2Decompressor(), self._blob(place)
        try:
            data: bytes = unpacked.decompress(packed, nbytes + 1)
        except OSError as error:
            raise ValueError("its model card is damaged") from error
        require(len(data) == nbytes and unpacked.eof and not unpacked.unused_data, "its model card is another")
        return data

    def _check_shard(self, shard: Mapping[str, Any]) -> None:
        name, header, specs = shard["name"], shard["header"], shard["specs"]
        prefix = prefix_of(name)
        require_plain(name)
        require((header is None) is not (specs is None), f"{name} has no header, or two")
        if header is not None:
            self.layouts.append(layout := read_layout(self._blob(header), self.path))
            self._metadata.setdefault(prefix, {}).update(layout.metadata)
            own = {prefix + key: spec for key, spec in layout.specs.items()}
        else:
            self.layouts.append(None)
            own = {key: checked_spec(entry) for key, entry in specs.items()}
            require(all(key.startswith(prefix) for key in own), f"{name} holds another component's tensors")
        require(not own.keys() & self.specs.keys(), f"a tensor of {name} twice")
        require(bool(own) or self._beside[prefix] == 1, f"{name} holds nothing")
        self.specs |= own
        self._holder |= dict.fromkeys(own, name)

    def _check_entry(self, name: str, entry: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Check the entry of a changed tensor, and return its (first byte, length) ranges in the file."""
        weight = self.weights.get(name)
        spec, was = checked_spec(entry["spec"]), weight.spec if weight else self.specs.get(name)
        for record in entry["records"]:
            *counts, digest, words = record
            fits = len(counts) == 4 and all(map(is_count, counts)) and are_hashes([digest], 1)
            require(fits and type(words) is int and 0 <= words < 1 << 64, f"{name}: a record")
        for placement in entry["placements"]:
            check_placement(name, placement, len(self.index["adapters"]))
        if "recoded" in entry:
            return self._check_recoded(name, entry, spec)
        if was is None:
            require(not entry["records"] and not entry["placements"], f"{name}: a record of nothing")
            require("replaced" not in entry and "copied" not in entry, f"{name} was not in the base")
            return []
        replaced = entry["replaced"]
        recipe = type(replaced) is bool and not (replaced and entry["placements"])
        require(recipe and (replaced or bool(entry["placements"]) or bool(weight)), f"{name}: no recipe")
        if weight:
            codes, copied = self.specs[weight.tensors[0]], None
            tiled = [] if replaced else coded_tiling(name, spec, was, codes, entry["placements"])
        else:
            tiled, copied = tiling(name, spec, was, entry["placements"])
        height = record_rows(spec.size // max(1, counted_rows(entry)), bool(weight))
        check_tiling(name, tiled, sorted((start, stop) for start, stop, *_ in entry["records"]), height)
        extents = [(at, length) for _, _, at, length, *_ in entry["records"]]
        if weight:
            kept = list(zip(kept_tensors(weight, entry), entry["coded"]["kept"], strict=True))
            for tensor, (at, hashes) in kept:
                fits = is_count(at) and are_hashes(hashes, -(-self.specs[tensor].nbytes // HASH_PART))
                require(fits, f"{name}: its stored tensors")
            extents += [(at, self.specs[tensor].nbytes) for tensor, (at, _) in kept]
        if copied is None:
            require("copied" not in entry, f"{name} was not copied")
            return extents
        first, at, hashes = entry["copied"]
        length = was.nbytes - (first * (was.nbytes // was.shape[0]) if first else 0)
        fits = type(first) is int and first == copied and is_count(at) and are_hashes(hashes, -(-length // HASH_PART))
        require(fits, f"{name}: its copied rows")
        return [*extents, (at, length)]

    def _check_recoded(self, name: str, entry: Mapping[str, Any], spec: TensorSpec) -> list[tuple[int, int]]:
        """Check the entry of codes that were written anew, and return its (first byte, length) ranges in the file."""
        recoded = entry["recoded"]
        shape = checked_spec(["F64", recoded["shape"]]).shape
        fits = isinstance(recoded["weight"], str) and isinstance(recoded["codec"], str) and len(shape) > 1
        require(fits and self.specs.get(name) == spec, f"{name}: codes of another type")
        rows, columns = recoded_shape(entry)
        require(bool(entry["placements"]) and rows * columns == prod(shape) > 0, f"{name}: its rows")
        require(all(each[ROWS] == rows for each in entry["placements"]), f"{name}: its rows")
        ranges = sorted((start, stop) for start, stop, *_ in entry["records"])
        check_tiling(name, recoded_tiling(entry), ranges, record_rows(columns, True))
        return [(at, length) for _, _, at, length, *_ in entry["records"]]

    def _check_written(self) -> None:
        """Check the hashes of unrecorded bytes, which all changed tensors have."""
        for name, entry in self.index["tensors"].items():
            parts = unrecorded(name, entry, [tuple(record[:2]) for record in entry["records"]])
            count = sum(1 for _ in islice(parts, len(entry["written"]) + 1))  # a size may be beyond all memory
            require(are_hashes(entry["written"], count), f"{name}: its hashes")

    def _check_side(self) -> None:
        """Check that a merge edits each of the side files, since they are written into the output."""
        index, new = self.index, self.index["new_side"]
        shards = [shard["name"] for shard in index["shards"]]
        require(isinstance(new, list) and all(isinstance(name, str) for name in new), "its new files")
        require(len({*self.side, *new, *shards}) == len(self.side) + len(new) + len(shards), "a file twice")
        indexed: set[str] = set()
        for name in (*self.side, *new):
            require_plain(name)
            prefix, last = prefix_of(name), name.rpartition("/")[2]
            if name == CARD and name not in new:
                continue
            elif last == "config.json":
                require(name in new or "weight_map" not in parse_json(self.side[name], self.path), f"{name} is none")
            elif is_of_tokenizer(name) or ((matches(name, DENSE) or last in QUANTIZERS) and name not in new):
                continue
            elif name in new:
                require(last in INDEX_NAMES, strange(name))
            else:
                require(self._is_index(name) and prefix not in indexed, strange(name))
                indexed.add(prefix)
        lone = {prefix_of(name) for name in shards if name.endswith((".safetensors", *PICKLES))}
        is_gguf = all(layout and layout.container == GGUF for layout in self.layouts)  # parts find each other
        for prefix, count in self._beside.items():
            found = is_gguf or prefix in indexed or (count == 1 and (index["file"] or prefix in lone))
            require(found, "it lacks the index by which the base's files are found")
            require(index["file"] or prefix + "config.json" in {*self.side, *new}, "it lacks a config.json")
        require(not index["file"] or self._beside == {"": 1}, "the base is one file, and several")

    def _is_index(self, name: str) -> bool:
        """Return whether the side file is the index of the shards that the undo file names."""
        prefix = prefix_of(name)
        held = {key.removeprefix(prefix): file for key, file in self._holder.items() if prefix_of(file) == prefix}
        own = {key: file.rpartition("/")[2] for key, file in held.items()}
        if not name.endswith(".json") or name not in self.side:
            return False
        return bool(own) and parse_json(self.side[name], self.path).get("weight_map") == own

    def bytes(self, at: int, length: int) -> bytes:
        buffer = memoryview(bytearray(length))
        read_into(self.file, buffer, at)
        return bytes(buffer)

    def records(self, tensor: str) -> list[Record]:
        entries = self.index["tensors"][tensor]["records"]
        return [Record(*entry) for entry in entries]

    def written(self) -> list[tuple[UnrecordedBytes, str]]:
        """Return the bytes of the changed tensors that are in no record, each with its hash."""
        return [
            found
            for name, entry in self.index["tensors"].items()
            for found in zip(
                unrecorded(name, entry, [(start, stop) for start, stop, *_ in entry["records"]]),
                entry["written"],
                strict=True,
            )
        ]

    def copied(self) -> list[tuple[str, int, int, str]]:
        """Return the parts of all that no record can restore: tensor, first byte here, length, sha256."""
        ranges = []
        for name, entry in self.index["tensors"].items():
            if "copied" in entry:
                first, start, hashes = entry["copied"]
                was = self.specs[name]
                ranges.append(
                    (name, start, was.nbytes - (first * (was.nbytes // was.shape[0]) if first else 0), hashes)
                )
            for tensor, start, hashes in self._kept(name) if name in self.weights else ():
                ranges.append((tensor, start, self.specs[tensor].nbytes, hashes))
        return [
            (name, start + at, min(HASH_PART, size - at), digest)
            for name, start, size, hashes in ranges
            for at, digest in zip(range(0, size, HASH_PART), hashes, strict=True)
        ]

    def _kept(self, name: str) -> Iterator[tuple[str, int, list[str]]]:
        """Yield the stored tensors of a coded weight that are here unchanged: name, first byte, hashes."""
        entry = self.index["tensors"][name]
        for tensor, (at, hashes) in zip(kept_tensors(self.weights[name], entry), entry["coded"]["kept"], strict=True):
            yield tensor, at, hashes

    def kept(self, name: str) -> tuple[StoredTensor, ...]:
        """Return the stored tensors of a coded weight that are here unchanged: its companions, or all of them."""
        places = {tensor: at for tensor, at, _ in self._kept(name)}
        file = _Kept(self, {tensor: self.specs[tensor] for tensor in places}, places)
        return tuple(StoredTensor(file, tensor) for tensor in places)

    def parts_of(self, name: str) -> Parts:
        """Return a coded weight with those of its stored tensors that are here unchanged."""
        weight, kept = self.weights[name], {tensor.name: tensor for tensor in self.kept(name)}
        roles = {role: kept[tensor] for role, tensor in weight.names.items() if tensor in kept}
        return Parts(weight, roles, self.specs[weight.tensors[0]])

    @property
    def merged_specs(self) -> dict[str, TensorSpec]:
        """Return the stored tensors of the merged model."""
        codes = {tensor for weight in self.weights.values() for tensor in weight.tensors}
        changed = {name: spec_of(entry["spec"]) for name, entry in self.index["tensors"].items()}
        return {name: spec for name, spec in {**self.specs, **changed}.items() if name in changed or name not in codes}

    def belongs_to(self, model: WeightsFile) -> bool:
        """Return whether the weights are those that the merge wrote, by the sums and hashes of all their bytes."""
        changed = {name: spec_of(entry["spec"]) for name, entry in self.index["tensors"].items()}
        if model.specs != self.merged_specs:
            return False
        for name, spec in changed.items():
            width = spec.nbytes // max(1, counted_rows(self.index["tensors"][name]))
            for record in () if "recoded" in self.index["tensors"][name] else self.records(name):
                at = model.begin[name] + record.start * width
                if sum_range(model.file, at, (record.stop - record.start) * width) != record.sum:
                    return False
        hashes = self.written()
        for name, parts in self.index["untouched"].items():
            size, starts = self.specs[name].nbytes, range(0, self.specs[name].nbytes, HASH_PART)
            hashes += [
                (UnrecordedBytes(name, at, min(HASH_PART, size - at)), one)
                for at, one in zip(starts, parts, strict=True)
            ]
        return all(
            sha256_range(model.file, model.begin[part.tensor] + part.start, part.length) == expected
            for part, expected in hashes
        )

    def close(self) -> None:
        self.file.close()
