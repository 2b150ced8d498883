"""Read an undo file without trusting it: anybody can have written it, so everything is checked before it is used.

The reader rejects what no merge writes: records that do not tile their tensor or the file, a tensor without an entry,
sizes larger than the file, names of files that no merge edits. The hashes protect the rest. `undo.writer` writes and
describes the layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.checkpoint import open_weights
from ..files.codecs import find_stored
from ..files.codecs.codec import Fault, Parts, StoredTensor, StoredWeight, Unclaimed
from ..files.codecs.quantized import QUANTIZERS
from ..files.containers.gguf_file import GGUF
from ..files.containers.indexed_file import FileKind, IndexedFile, is_count, require
from ..files.containers.layouts import FileLayout, read_layout
from ..files.containers.safetensors_file import parse_json
from ..files.digest import PIECE, pieces_of
from ..files.dtypes import TensorSpec
from ..files.folder.model_folder import INDEX_NAMES, PICKLES
from ..files.folder.sentence_transformers import DENSE
from ..files.folder.side_files import CARD, SMALL_TEXT, UNDO_MARK, is_of_tokenizer, matches
from ..files.layer_numbers import RepeatedLayers
from ..files.weights_file import PlacedTensors, WeightsFile, read_parts
from ..numerics.passes.hashes import sha256_each
from .checks import (
    ROWS,
    Tiles,
    bytes_before,
    check_adapter,
    check_placement,
    checked_spec,
    is_recorded,
    is_replaced,
    kept_names,
    prefix_of,
    recoded_shape,
    require_plain,
    spec_of,
    strange,
    tiles_of,
)
from .table import Stretch, UndoTable, hash_payload

UNDO = FileKind(
    mark=UNDO_MARK,
    version=4,
    end=b"loraundo",
    noun="an undo file",
    remedy="use the one that the merge wrote, or subtract and round with --approximate, which is not exact",
    other_version="use the loratool that merged",
)


@dataclass(frozen=True)
class Record(Stretch):
    """The record of rows start:stop of a tensor."""

    start: int
    stop: int


def _split(hashes: bytes) -> list[str]:
    return [hashes[at : at + 32].hex() for at in range(0, len(hashes), 32)]


def belongs(undo: Path, model: Path) -> bool:
    """Return whether an undo file belongs to a weights file; False if either cannot be read."""
    try:
        weights = open_weights(model)
    except InputError:
        return False
    try:
        opened = UndoFile(undo)
    except InputError:
        weights.close()
        return False
    try:
        return opened.belongs_to(weights)
    finally:
        opened.close()
        weights.close()


class UndoFile(IndexedFile):
    """An undo file; opening reads and checks only the index.

    Attributes:
        specs: the base's stored tensors.
        untouched: those that the merge copied.
        hashes: a tensor of the base -> the hashes of its pieces (`files.digest`), of 32 bytes each.
        written: the same of changed tensors, as the merge wrote them.
        weights: the changed weights that it stores as codes.
        layouts: that of each of the base's shards; None for a torch file.
        layers: the base's layers in the merged model, if that repeats them.
        copies: tensors of the merged model's other layers.
        side: name of a side file of the base -> its content.

    Raises:
        InputError: the file is damaged, forged or of another version.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, UNDO)
        with self.checked():
            self._check()

    def _check(self) -> None:
        index = self.index
        require(
            type(index["arithmetic"]) is int and type(index["file"]) is bool,
            "its arithmetic or file has the wrong type",
        )
        for adapter in index["adapters"]:
            check_adapter(adapter)
        names = [shard["name"] for shard in index["shards"]]
        require(len(set(names)) == len(names) > 0, "it names no file of the base, or one twice")
        self._beside = Counter(prefix_of(name) for name in names)
        self.layouts: list[FileLayout | None] = []
        self.specs: dict[str, TensorSpec] = {}
        self.hashes: dict[str, bytes] = {}
        self.written: dict[str, bytes] = {}
        self._holder: dict[str, str] = {}
        self._metadata: dict[str, dict[str, str]] = {}  # of the files, by component
        for shard in index["shards"]:
            self._check_shard(shard)
        self._table, stop = UndoTable.one_after_another(self.blob(index["table"]), len(UNDO.first_line))
        self.weights = self._find_weights()
        changed = {tensor for weight in self.weights.values() for tensor in weight.tensors} | index["tensors"].keys()
        self.untouched = frozenset(self.specs.keys() - changed)
        self._check_layers()
        self._check_entries()
        self._read_hashes(self.blob(index["hashes"]))
        self._payload, self._payload_bytes = self.blob(index["payload"]), stop - len(UNDO.first_line)
        pieces = -(-self._payload_bytes // PIECE)
        require(len(self._payload) == 32 * pieces, "its hashes are not as many as its payload has pieces")
        self.side = {name: self.blob(place) for name, place in index["side"].items()}
        if "card" in index:
            require(CARD not in self.side, "its model card")
            self.side[CARD] = self.packed_blob("its model card", index["card"], index["card_bytes"], SMALL_TEXT)
        self.require_tiled(self._payload_bytes)
        self._check_side()

    def _find_weights(self) -> dict[str, StoredWeight]:
        """Return the weights that were stored as codes, as the codecs find them among the base's tensors."""
        entries = {name: entry for name, entry in self.index["tensors"].items() if "coded" in entry}
        weights: dict[str, StoredWeight] = {}
        for prefix in {prefix_of(shard["name"]) for shard in self.index["shards"]} if entries else ():
            specs = {tensor: spec for tensor, spec in self.specs.items() if prefix_of(self._holder[tensor]) == prefix}
            read = partial(self._read_kept, self._kept_rows(prefix))
            metadata = self._metadata.get(prefix, {})
            weights |= find_stored(Unclaimed(specs, self.index["declared"][prefix], metadata, read, prefix))[0]
        for name, entry in entries.items():
            coded = entry["coded"]
            fits = name in weights and weights[name].codec.key == coded["codec"]
            fits = fits and list(weights[name].tensors) == coded["tensors"]
            require(fits, f"{name} was not stored as codes of {coded['codec']}")
            both = self.index["tensors"].keys() & set(weights[name].tensors) - {name}
            require(not both, f"{name}: an entry of its own for a part of it")
        return {name: weights[name] for name in entries}

    def _kept_rows(self, prefix: str) -> dict[str, int]:
        """Return the first table row of each stored tensor of a component's weights that is here unchanged."""
        first_rows = {}
        for name, entry in self.index["tensors"].items():
            tensors, row = kept_names(entry) if name.startswith(prefix) else [], entry["row"]
            require(is_count(row), f"{name}: its rows of the table")
            for tensor in tensors:
                first_rows[tensor] = row
                row += self.specs[tensor].nbytes > 0
        return first_rows

    def _read_kept(self, rows: Mapping[str, int], name: str) -> bytes:
        if name not in rows:
            raise Fault(f"{name} is of a weight that the merge did not change")
        nbytes = self.specs[name].nbytes
        return self.bytes(self._table.at(rows[name]), nbytes) if nbytes else b""

    def _check_shard(self, shard: Mapping[str, Any]) -> None:
        name, header, specs = shard["name"], shard["header"], shard["specs"]
        prefix = prefix_of(name)
        require_plain(name)
        require((header is None) is not (specs is None), f"{name} has no header, or two")
        if header is not None:
            self.layouts.append(layout := read_layout(self.blob(header), self.path))
            self._metadata.setdefault(prefix, {}).update(layout.metadata)
            stored = {prefix + key: spec for key, spec in layout.specs.items()}
        else:
            self.layouts.append(None)
            stored = {key: checked_spec(entry) for key, entry in specs.items()}
            require(all(key.startswith(prefix) for key in stored), f"{name} holds another component's tensors")
        require(not stored.keys() & self.specs.keys(), f"a tensor of {name} twice")
        require(bool(stored) or self._beside[prefix] == 1, f"{name} holds nothing")
        self.specs |= stored
        self._holder |= dict.fromkeys(stored, name)

    def _check_entries(self) -> None:
        """Check the entries of changed tensors; their rows in the table follow each other in the order of names."""
        done = 0
        for name, entry in sorted(self.index["tensors"].items()):
            require(is_count(entry["row"]) and entry["row"] == done, f"{name}: its rows of the table")
            tiles = self._check_entry(name, entry)
            sizes = [nbytes for _, nbytes in self._copied_sizes(name, tiles)]
            done += len(sizes) + tiles.count()
            require(done <= len(self._table), "its table has fewer rows than its tensors")
            lengths = [stretch.length for stretch in self._table.rows(entry["row"], len(sizes))]
            require(lengths == sizes, f"{name}: its unchanged part is not of its size")
        require(done == len(self._table), "its table has more rows than its tensors")

    def _check_entry(self, name: str, entry: Mapping[str, Any]) -> Tiles:
        """Check the entry of a changed tensor, and return its rows that are in this file."""
        weight = self.weights.get(name)
        spec, was = checked_spec(entry["spec"]), weight.spec if weight else self.specs.get(name)
        for placement in entry["placements"]:
            check_placement(name, placement, len(self.index["adapters"]))
        if "recoded" in entry:
            self._check_recoded(name, entry, spec)
        elif was is None:
            require(not entry["placements"] and "replaced" not in entry, f"{name} was not in the base")
        else:
            replaced = entry.get("replaced", False)
            recipe = type(replaced) is bool and not (replaced and entry["placements"])
            require(recipe and (replaced or bool(entry["placements"]) or bool(weight)), f"{name}: no recipe")
        return self._tiles(name)

    def _check_layers(self) -> None:
        """Check the base's layers in a merged model that repeats them, and the tensors of its other layers."""
        self.layers: RepeatedLayers | None = None
        self.copies: dict[str, TensorSpec] = {}
        self._of_copies: dict[str, bytes] = {}  # hashes
        entry = self.index.get("layers")
        if entry is None:
            return
        path, numbers = entry["path"], entry["numbers"]
        require(isinstance(path, str) and path.endswith("."), "the path of its layers")
        require(isinstance(numbers, list) and all(map(is_count, numbers)), "the numbers of its layers")
        require(len(set(numbers)) == len(numbers) > 0, "a layer twice")
        self.layers = RepeatedLayers(path, tuple(numbers))
        names = {*self.specs, *self.index["tensors"]}
        require(max(filter(None, map(self.layers.number_of, names)), default=0) < len(numbers), "a layer too many")
        coded = self.weights or any("recoded" in each for each in self.index["tensors"].values())
        require(not coded, "codes in repeated layers")
        for name, spec in entry["copies"].items():
            self.copies[name] = checked_spec(spec)
            require(self.layers.number_of(name) not in (None, *numbers), f"{name} is not a copy")

    def _read_hashes(self, data: bytes) -> None:
        """Read the hashes of the pieces of the base's tensors, and of others of the merged model as it was written."""
        changed = {name: spec_of(entry["spec"]) for name, entry in self.index["tensors"].items()}
        read = 0
        parts = ((self.specs, self.hashes), (changed, self.written), (self.copies, self._of_copies))
        for specs, hashes in parts:
            for name in sorted(specs):
                size = 32 * -(-specs[name].nbytes // PIECE)
                hashes[name] = data[read : read + size]
                read += size
        require(read == len(data), "its hashes are not as many as its tensors have pieces")

    def _tiles(self, name: str) -> Tiles:
        weight = self.weights.get(name)
        codes = self.specs[weight.tensors[0]] if weight else None
        return tiles_of(name, self.index["tensors"][name], weight.spec if weight else self.specs.get(name), codes)

    def _copied_sizes(self, name: str, tiles: Tiles) -> list[tuple[str, int]]:
        """Return the base's tensors that are here unchanged for a changed one, each with its bytes, if it has any."""
        sizes = []
        if name in self.weights:
            sizes = [(tensor, self.specs[tensor].nbytes) for tensor in kept_names(self.index["tensors"][name])]
        elif tiles.copied is not None:
            sizes = [(name, self.specs[name].nbytes - bytes_before(self.specs[name], tiles.copied))]
        return [(tensor, nbytes) for tensor, nbytes in sizes if nbytes]

    def _check_recoded(self, name: str, entry: Mapping[str, Any], spec: TensorSpec) -> None:
        """Check the entry of codes that were rewritten."""
        recoded = entry["recoded"]
        shape = checked_spec(["F64", recoded["shape"]]).shape
        fits = isinstance(recoded["weight"], str) and isinstance(recoded["codec"], str) and len(shape) > 1
        require(fits and self.specs.get(name) == spec, f"{name}: codes of another type")
        rows, columns = recoded_shape(entry)
        require(bool(entry["placements"]) and rows * columns == prod(shape) > 0, f"{name}: its rows")
        require(all(each[ROWS] == rows for each in entry["placements"]), f"{name}: its rows")

    def _check_side(self) -> None:
        """Check that all side files are ones that a merge edits, since they are written into the output."""
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
            is_findable = is_gguf or prefix in indexed or (count == 1 and (index["file"] or prefix in lone))
            require(is_findable, "it lacks the index of the base's files")
            require(index["file"] or prefix + "config.json" in {*self.side, *new}, "it lacks a config.json")
        require(not index["file"] or self._beside == {"": 1}, "the base is one file, and several")

    def _is_index(self, name: str) -> bool:
        """Return whether the side file is the index of the shards that the undo file names."""
        prefix = prefix_of(name)
        held = {key.removeprefix(prefix): file for key, file in self._holder.items() if prefix_of(file) == prefix}
        listed = {key: file.rpartition("/")[2] for key, file in held.items()}
        if not name.endswith(".json") or name not in self.side:
            return False
        return bool(listed) and parse_json(self.side[name], self.path).get("weight_map") == listed

    def records(self, tensor: str) -> list[Record]:
        tiles = self._tiles(tensor)
        first = self.index["tensors"][tensor]["row"]
        first += len(self._copied_sizes(tensor, tiles))
        both = zip(tiles.records(), self._table.rows(first, tiles.count()), strict=True)
        return [Record(**vars(stretch), start=start, stop=stop) for (start, stop), stretch in both]

    def runs(self, tensor: str) -> list[tuple[int, int]]:
        """Return the runs of a changed tensor's rows that have records; no record crosses the end of one."""
        return self._tiles(tensor).runs

    def replaced(self) -> list[str]:
        """Return the changed tensors that are not merged from an update of their rows, and codes."""
        entries = self.index["tensors"].items()
        return [name for name, each in entries if is_replaced(each) or "recoded" in each or name in self.weights]

    def unrecorded(self) -> list[str]:
        """Return the changed tensors some of whose bytes, as the merge wrote them, are in no record."""
        return [name for name, entry in self.index["tensors"].items() if not is_recorded(entry, self._tiles(name))]

    def _copies(self, name: str) -> dict[str, int]:
        """Return the base's tensors that are here unchanged for a changed one, and the first byte of each here."""
        row, sizes = self.index["tensors"][name]["row"], self._copied_sizes(name, self._tiles(name))
        return {tensor: self._table.at(row + k) for k, (tensor, _) in enumerate(sizes)}

    def copied_rows(self, name: str) -> tuple[int, int] | None:
        """Return the first row of a tensor that is here unchanged, and its first byte here; None without any."""
        first = None if name in self.weights else self._tiles(name).copied
        return None if first is None else (first, self._copies(name).get(name, 0))

    def kept(self, name: str) -> tuple[StoredTensor, ...]:
        """Return the stored tensors of a coded weight that are here unchanged: the companions, or all."""
        places = dict.fromkeys(kept_names(self.index["tensors"][name]), 0) | self._copies(name)
        file = PlacedTensors(self.path, self.file, {tensor: self.specs[tensor] for tensor in places}, places)
        return tuple(StoredTensor(file, tensor) for tensor in places)

    def parts_of(self, name: str) -> Parts:
        """Return a coded weight with those of its stored tensors that are here unchanged."""
        weight, unchanged = self.weights[name], {tensor.name: tensor for tensor in self.kept(name)}
        roles = {role: unchanged[tensor] for role, tensor in weight.names.items() if tensor in unchanged}
        return Parts(weight, roles, self.specs[weight.tensors[0]])

    @property
    def merged_specs(self) -> dict[str, TensorSpec]:
        """Return the stored tensors of the merged model, those of repeated layers under the base's names."""
        codes = {tensor for weight in self.weights.values() for tensor in weight.tensors}
        changed = {name: spec_of(entry["spec"]) for name, entry in self.index["tensors"].items()}
        return {name: spec for name, spec in {**self.specs, **changed}.items() if name in changed or name not in codes}

    def merged_tensors(self) -> dict[str, tuple[TensorSpec, list[str]]]:
        """Return all tensors of the merged model, by their names there, with the hashes of their pieces."""
        tensors = {name: (spec, self.merged_hashes(name)) for name, spec in self.merged_specs.items()}
        if self.layers:
            tensors = {self.layers.stored_name(name): each for name, each in tensors.items()}
        return tensors | {name: (spec, _split(self._of_copies[name])) for name, spec in self.copies.items()}

    def belongs_to(self, model: WeightsFile) -> bool:
        """Return whether the weights are those that the merge wrote, comparing hashes of all bytes."""
        tensors = self.merged_tensors()
        if model.specs != {name: spec for name, (spec, _) in tensors.items()}:
            return False
        pieces = [(name, *place) for name, spec in model.specs.items() for place in pieces_of(spec)]
        for start in range(0, len(pieces), 2):
            pair = pieces[start : start + 2]
            expected = [tensors[name][1][first // PIECE] for name, first, _ in pair]
            if sha256_each([read_parts(model, *each) for each in pair]) != expected:
                return False
        return True

    def require_sound(self) -> None:
        """Raise InputError unless all records and unchanged bytes are as the merge wrote them, by their hashes."""
        with self.checked():
            found = hash_payload(self.path, self.file, len(UNDO.first_line), self._payload_bytes)
            require(found == self._payload, "its records do not match their hashes")

    def base_hashes(self, name: str) -> list[str]:
        """Return the hashes of the pieces of a tensor of the base."""
        return _split(self.hashes[name])

    def merged_hashes(self, name: str) -> list[str]:
        """Return the hashes of the pieces of a tensor of the merged model, by its name in `merged_specs`."""
        return _split(self.written[name] if name in self.written else self.hashes[name])
