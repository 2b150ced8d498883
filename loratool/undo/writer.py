"""Write the undo file, from which a merge's base can be restored bit for bit.

    bytes 0..15   `loratool undo 4\n`: the file's type, and the version of its layout
    payload       tensor by tensor, sorted by name: what no record can restore, unchanged (stored tensors of a weight of
                  codes, or rows that were cut off); then the records, rows rising (`undo.records`)
    blobs         the table, which has a row for each record and each unchanged tensor (`undo.table`);
                  the hashes of the pieces (`files.digest`) of all tensors of the base, sorted by name, then of the
                  changed ones as the merge wrote them; the hashes of the payload's pieces;
                  then the base's headers, then its side files, unchanged, then its model card, compressed
    index         a JSON object, as `make_index` makes it, in ASCII with sorted keys and no spaces
    last 56       the index's offset and length, little-endian u64, its sha256, then `loraundo`

The entry of a tensor in the index has the number of its first row in the table. The number of rows, and the rows of W
of each, follow from its placements and shape (`undo.checks.Tiles`). A blob's hash is beside its place. The index has
every placement, with the number of its adapter, so that nothing has to be resolved again; and the adapters' hashes and
weights. Nothing is deflated, since the output of deflate differs between libraries. Cards are compressed by bzip2: it
has one library, and all its versions write the same bytes.

A weight that was stored as codes may become numbers. Then `coded` of its entry has the codec's name and its stored
tensors. The companions are unchanged in the payload; if its values were replaced, the codes are too. Its records have
the differences between its codes and those nearest to W' - D, in the codec's order. `declared`, the quantization
config of each component, is present if anything was coded: the codec finds the weights again with it. A weight that
stays codes has an entry under their name, with `recoded`; its records have the differences to its new codes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..adapters.adapter import Adapter
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import UpdateSpec
from ..binding.merge.merge_plan import MergePlan
from ..binding.modules.module_weights import record_weights
from ..binding.modules.placement import Placement
from ..binding.modules.resolve import refuse_second_nonadditive, rows_together
from ..durable.fileio import copy_range, open_for_reading, write_at
from ..durable.journal import StoredBytes
from ..errors import InputError, NeedsFlag
from ..files.checkpoint import Checkpoint
from ..files.containers.file_kinds import NPZ
from ..files.containers.indexed_file import TRAILER, index_text, is_readable, packer, write_end
from ..files.digest import pieces_of
from ..files.dtypes import DTYPES, TensorSpec
from ..files.folder.side_files import CARD, has_card, is_of_whole
from ..files.layer_numbers import RepeatedLayers
from ..files.output.model_card import shown_name
from ..files.output.output import Output
from ..files.weights_file import WeightsFile, copy_bytes
from .checks import (
    Tiles,
    bytes_before,
    counted_rows,
    is_replaced,
    kept_names,
    recoded_shape,
    rows_sharing,
    spec_of,
    tiles_of,
)
from .differences import UNIT, WIDEST
from .reader import UNDO
from .restorable import RestorableMerge, restorable_merge
from .table import ROW, hash_payload

PENDING = struct.Struct("<QIQQQ")  # of a record: first row, number of its journal, offset there, bytes, sum


class UndoWriter:
    """Takes records in any order, and writes them in the order of the tensors' names. They wait in the journals."""

    def __init__(self) -> None:
        self._records: dict[str, bytearray] = {}  # as PENDING, since they are many
        self._journals: dict[BinaryIO, int] = {}

    def add(self, tensor: str, start: int, record: StoredBytes, sum: int) -> None:
        """Add the record of a tensor's rows from `start` on, with the sum of W'."""
        journal = self._journals.setdefault(record.file, len(self._journals))
        packed = PENDING.pack(start, journal, record.offset, record.nbytes, sum)
        self._records.setdefault(tensor, bytearray()).extend(packed)

    def finish(
        self,
        target: BinaryIO,
        plan: MergePlan,
        output: Output,
        read: Mapping[str, Sequence[str]],
        written: Mapping[str, Sequence[str]],
    ) -> int:
        """Write the file, and return its size.

        Args:
            read: a stored tensor of the base -> the hashes of its pieces.
            written: a changed tensor of the output -> the same.
        """
        base = plan.base
        write_at(target, memoryview(UNDO.first_line), 0)
        position, rows = len(UNDO.first_line), bytearray()
        merge = restorable_merge(plan, output)
        index, plan = make_index(merge), merge.plan
        journals = list(self._journals)
        for name, entry in sorted(index["tensors"].items()):
            entry["row"] = len(rows) // ROW.size
            tiles = _tiles(plan, name, entry)
            for tensor, first in _unchanged(plan, name, entry, tiles):
                position = _copy(plan.base, tensor, first, target, position, rows)
            records = sorted(PENDING.iter_unpack(self._records.get(merge.names[name], b"")))
            if [start for start, *_ in records] != [start for start, _ in tiles.records()]:
                raise AssertionError(f"{name}: its records are incomplete, or those of another tensor")
            for _, journal, offset, nbytes, words in records:
                copy_range(journals[journal], offset, target, position, nbytes)
                rows += ROW.pack(nbytes, words)
                position += nbytes
        index["table"] = bytes(rows)
        hashes = [read[name] for name in sorted(plan.base.stored)]
        hashes += [written[merge.names[name]] for name in sorted(index["tensors"])]
        hashes += [written.get(name) or read[base.stored_name(name)] for name in sorted(merge.copies)]
        index["hashes"] = bytes.fromhex("".join(chain.from_iterable(hashes)))
        first = len(UNDO.first_line)
        index["payload"] = hash_payload(output.path, target, first, position - first)
        return write_end(target, position, index, _blobs(index), UNDO)


FAR, HASH = 1 << 48, "f" * 64  # placeholders in the index of `largest_undo`, at least as long as any value


def largest_undo(plan: MergePlan, output: Output) -> int:
    """Return the largest size that the undo file of a merge can have.

    A merge that keeps most of the base's digits stores a hundredth of that, but it depends on the weights.

    Raises:
        NeedsFlag: its index would be too large for the reader.
    """
    merge = restorable_merge(plan, output)
    index, size, rows = make_index(merge), len(UNDO.first_line) + TRAILER.size, 0
    pieces = sum(len(pieces_of(output.specs[name])) for name in merge.copies)
    plan, output = merge.plan, merge.output
    pieces += sum(len(pieces_of(spec)) for spec in plan.base.stored.values())
    for name, entry in index["tensors"].items():
        tiles = _tiles(plan, name, entry)
        unchanged = [_bytes_from(plan.base, *each) for each in _unchanged(plan, name, entry, tiles)]
        size += sum(unchanged) + _largest_records(plan, name, entry, tiles)
        rows += tiles.count() + sum(nbytes > 0 for nbytes in unchanged)
        pieces += len(pieces_of(output.specs[name]))
        entry["row"] = FAR
    index["table"], index["hashes"] = bytes(rows * ROW.size), bytes(pieces * 32)
    index["payload"] = bytes(32 * len(pieces_of(TensorSpec("U8", (size,)))))
    blobs = sum(len(owner[key]) for owner, key in _blobs(index))
    for owner, key in _blobs(index):
        owner[key] = [FAR, len(owner[key]), HASH]
    text = index_text(index)
    if not is_readable(text, blobs):
        raise NeedsFlag(
            f"would need an undo file of {len(index['tensors']):,} changed tensors with {blobs:,} bytes of headers, "
            "side files and hashes, more than one can have",
            culprit=str(output.path),
            flags="--no-undo",
        )
    return size + blobs + len(text)


def _tiles(plan: MergePlan, name: str, entry: Mapping[str, Any]) -> Tiles:
    weight = plan.base.weights.get(name)
    codes = plan.base.stored[weight.tensors[0]] if weight else None
    return tiles_of(name, entry, plan.base.specs.get(name), codes)


def _unchanged(plan: MergePlan, name: str, entry: Mapping[str, Any], tiles: Tiles) -> list[tuple[str, int]]:
    """Return the stored tensors that no record of a changed tensor restores, each with its first such row."""
    if "coded" in entry:
        return [(tensor, 0) for tensor in kept_names(entry)]
    return [] if tiles.copied is None else [(name, tiles.copied)]


def unrestored(plan: MergePlan, output: Output) -> list[str]:
    """Return the changed tensors of which an undo file has some rows unchanged, as no record restores them."""
    entries = make_entries(plan, output)
    return [name for name, entry in entries.items() if _unchanged(plan, name, entry, _tiles(plan, name, entry))]


def _largest_records(plan: MergePlan, name: str, entry: Mapping[str, Any], tiles: Tiles) -> int:
    """Return the most bytes of a tensor's records: a number of the stored type and a bit per weight, and overhead."""
    base, rows, records = plan.base, sum(last - first for first, last in tiles.runs), tiles.count()
    if not rows:
        return 0
    if "recoded" in entry:
        return _largest_codes(base, entry["recoded"]["weight"], rows * recoded_shape(entry)[1], records)
    was, columns, norms = base.specs[name], spec_of(entry["spec"]).size // counted_rows(entry), 0
    for p in plan.placements.get(name, ()) if not is_replaced(entry) else ():
        axis = None if p.update.additive else p.update.cls.norm_axis(p.update, p.transposed)
        norms = max(norms, 8 * rows if axis == 0 else 8 * columns * len(tiles.runs) if axis == 1 else 0)
        norms = max(norms, 8 * rows * p.update.cls.projections(p.update, columns))
        if p.update.cls.reads_columns:
            norms = max(norms, 8 * columns * p.update.cls.change_rank(p.update) * len(tiles.runs))
    count = rows * columns
    if name in base.weights:
        return norms + _largest_codes(base, name, count, records)
    if is_replaced(entry) or was.dtype == "F64":
        return norms + count * DTYPES[was.dtype] // 8 + count // UNIT + records
    return norms + count * (DTYPES[was.dtype] + 1) // 8 + records  # one more bit for each: it is not 0.0


def _largest_codes(base: Checkpoint, name: str, count: int, records: int) -> int:
    """Return the most bytes of records of `count` numbers of a coded weight: WIDEST bits a code, with padding."""
    parts = base.parts_of(name)
    codes = count // parts.weight.spec.shape[-1] * parts.weight.format.width(parts)
    return codes * WIDEST // 8 + (1 + 3 * 16) * records  # heads and ends of the three lists


def _blobs(index: dict[str, Any]) -> list[tuple[Any, str]]:
    """Return the places in the index of table, hashes, headers, side files and card, as (mapping, key)."""
    blobs: list[tuple[Any, str]] = [(index, "table"), (index, "hashes"), (index, "payload")]
    blobs += [(shard, "header") for shard in index["shards"] if shard["specs"] is None]
    blobs += [(index["side"], name) for name in sorted(index["side"])]
    return blobs + ([(index, "card")] if "card" in index else [])


def sort_adapters(adapters: Iterable[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """Sort adapters and their weights by hash, so that the order does not depend on the command line."""
    return sorted(adapters, key=lambda p: (p[0].sha256, p[0].scales_sha256, p[1], p[0].module_weights))


def adapter_entry(adapter: Adapter, weight: float) -> dict[str, Any]:
    """Return an adapter's entry in the index, with weights by module only if some modules have their own."""
    entry = {"scales_sha256": adapter.scales_sha256, "sha256": adapter.sha256, "weight": weight}
    return {**entry, **record_weights(adapter.module_weights)}


def make_index(merge: RestorableMerge) -> dict[str, Any]:
    """Return the index without records, with the content of headers and side files where their places will be."""
    plan, output, base = merge.plan, merge.output, merge.plan.base
    adapters = sort_adapters(plan.adapters)
    inner = f"{base.folder.name}/" if base.outer else ""
    extras = {name.removeprefix(inner) for name in output.extras}
    names = (extras | plan.edits.files.keys() | plan.edits.skipped_files.keys()) - {CARD}
    for model in base.models if base.has_side_files else ():
        names |= {model.prefix + name for name in ("config.json", *([model.index[0]] if model.index else []))}
    paths = {name: (base.root if is_of_whole(name) else base.folder) / name for name in sorted(names)}
    side = {name: _read(path) for name, path in paths.items() if path.is_file()}
    card = _read(base.root / CARD) if base.has_side_files and has_card(base.root) else None
    tensors = make_entries(plan, output)
    coded = any("coded" in entry for entry in tensors.values())
    return {
        "version": UNDO.version,
        "arithmetic": json.loads(output.provenance)["arithmetic"],
        "adapters": [{"name": Path(shown_name(a.name)).name, **adapter_entry(a, w)} for a, w in adapters],
        "file": base.given_as_file,
        "shards": [_shard(shard) for shard in base.shards],
        "side": side,
        "new_side": sorted(names - side.keys()),
        "tensors": tensors,
        **({"declared": {part.prefix: part.declared for part in base.models}} if coded else {}),
        **({"layers": _layers(merge.layers, merge.copies)} if merge.layers else {}),
        **({} if card is None else {"card": packer().compress(card), "card_bytes": len(card)}),
    }


def _layers(layers: RepeatedLayers, copies: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return the index's entry of repeated layers."""
    specs = {name: [spec.dtype, list(spec.shape)] for name, spec in copies.items()}
    return {"path": layers.path, "numbers": list(layers.numbers), "copies": specs}


def _shard(shard: WeightsFile) -> dict[str, Any]:
    header = shard.header
    specs = {name: [spec.dtype, list(spec.shape)] for name, spec in shard.specs.items()}
    name = shard.place
    if shard.scattered or shard.file_format == NPZ:  # unmerge writes a torch file for what it cannot write
        name = f"{shard.prefix}pytorch_model.bin"
    return {"name": name, "header": header, "specs": specs if header is None else None}


def _bytes_from(base: Checkpoint, name: str, row: int) -> int:
    """Return the bytes of a stored tensor from a row on."""
    return base.stored[name].nbytes - bytes_before(base.stored[name], row)


def _copy(base: Checkpoint, name: str, row: int, target: BinaryIO, start: int, rows: bytearray) -> int:
    """Copy a stored tensor from a row on, add its row to the table, and return the byte after the copy."""
    source, nbytes = base.shard_of[name], _bytes_from(base, name, row)
    first = bytes_before(base.stored[name], row)
    copy_bytes(source, name, first, nbytes, target, start)
    if nbytes:
        rows += ROW.pack(nbytes, 0)
    return start + nbytes


def _read(path: Path) -> bytes:
    with open_for_reading(path) as file:
        return file.read()


def make_entries(plan: MergePlan, output: Output) -> dict[str, dict[str, Any]]:
    """Return the index's entries of changed tensors, without their rows in the table."""
    numbers = {id(adapter): number for number, (adapter, _) in enumerate(sort_adapters(plan.adapters))}
    return {name: _entry(plan, output, name, numbers) for name in output.specs if name in plan.written}


def _entry(plan: MergePlan, output: Output, name: str, numbers: Mapping[int, int]) -> dict[str, Any]:
    spec, base_name, base = output.specs[name], plan.written[name], plan.base
    entry: dict[str, Any] = {"spec": [spec.dtype, list(spec.shape)], "placements": []}
    weight = base.weights.get(base_name)
    if weight and base_name in plan.recoded:
        entry["recoded"] = {"weight": base_name, "shape": list(weight.spec.shape), "codec": weight.codec.key}
    elif name not in base.specs:
        return entry
    elif weight:
        entry["coded"] = {"codec": weight.codec.key, "tensors": list(weight.tensors)}
    source, stored = plan.sources[base_name], weight.tensors[0] if weight else name
    if (source.name, source.file) != (stored, base.shard_of[stored]):
        entry["replaced"] = True
    else:
        placements = plan.placements.get(base_name, ())
        entry["placements"] = sorted((_placement(p, numbers) for p in placements), key=repr)
        if (together := rows_together(placements)) > 1:
            entry["together"] = together
        if weight and (sharing := rows_sharing(base.parts_of(base_name), weight.spec.size // counted_rows(entry))) > 1:
            entry["sharing"] = sharing
    return entry


def _placement(p: Placement, numbers: Mapping[int, int]) -> list[Any]:
    value = p.update.tensors["value"] if p.update.cls is ReplaceTensor else None
    # the first files of version 2 treated norms of columns as norms of the transpose's rows
    place = [p.transposed is not p.update.along_inputs, p.rows, p.start, p.stop, p.skip, p.expert]
    return [numbers[id(p.adapter)], p.update.module, value, p.weight, *place]


def read_placements(
    index: Mapping[str, Any], tensor: str, spec: TensorSpec, adapters: Sequence[Adapter]
) -> list[Placement]:
    """Read the placements of a tensor.

    Args:
        adapters: in the order of the index.

    Raises:
        InputError: an adapter belongs to another model.
    """
    placements = []
    for number, module, value, weight, *place in index["tensors"][tensor]["placements"]:
        adapter = adapters[number]
        if module not in adapter.updates or (value is not None and value not in adapter.file.specs):
            raise InputError(f"has no {value or module}, which the undo file names", culprit=adapter.name)
        if value is None:
            update = adapter.updates[module]
            update = update.cls.of_tensor(update, spec.shape)
            place[0] = bool(place[0]) is not update.along_inputs
            update = update.cls.of_transposed(update) if place[0] else update
        else:
            update = UpdateSpec(ReplaceTensor, module, {"value": value}, {"value": adapter.file.specs[value]})
        placements.append(Placement(adapter, update, weight, *place))
        if spec.size and not _fits(placements[-1], spec):
            raise InputError(f"{module} of {adapter.name} is not of the shape that the undo file says", culprit=tensor)
    refuse_second_nonadditive(tensor, placements)
    return placements


def _fits(placement: Placement, spec: TensorSpec) -> bool:
    """Return whether an update has the shape that its placement needs."""
    update, shape = placement.update, placement.update.shape
    if update.cls.stack is not (placement.expert is not None):
        return False
    if update.cls.in_stored_layout and not update.additive:
        takes_all_rows = (placement.start, placement.stop, placement.skip) == (0, placement.rows, 0)
        if placement.transposed or placement.rows != (*spec.shape, 1)[0]:
            return False
        if update.cls is ReplaceTensor and not takes_all_rows:
            inside = 0 <= placement.skip <= placement.skip + placement.stop - placement.start <= (*shape, 0)[0]
            return inside and shape[1:] == spec.shape[1:]
        return takes_all_rows and update.cls.misfit(update, spec, "") is None
    if placement.expert is not None and placement.expert >= shape[0]:
        return False
    sides = update.cls.flat(update)
    rows, columns = sides[::-1] if placement.transposed else sides
    covered = placement.stop - placement.start
    return (
        columns in (None, spec.size // placement.rows)
        and covered > 0
        and (rows is None or covered <= rows - placement.skip)
    )
