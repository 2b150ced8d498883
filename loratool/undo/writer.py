"""Write the undo file, from which a merge's base can be restored bit for bit.

    bytes 0..15   `loratool undo 2\n`: the file's type, and the version of its layout
    records       one after the other, tensor by tensor in the output's order, rows rising (`undo.records`); rows of a
                  tensor that no record can restore follow them unchanged (`copied` in the index: first row, offset,
                  hashes)
    blobs         the base's headers, then its side files, as they are, then its model card, compressed
    index         a JSON object, as `make_index` makes it, in ASCII with sorted keys and no spaces
    last 56       the index's offset and length, little-endian u64, its sha256, then `loraundo`

Each record has the sha256 of its rows of W as they are stored, and the sum of those of W'. `untouched` in the index has
the hashes of tensors that were copied, one per 64 MiB. `written` of a changed tensor has those of its rows that are in
no record, as the merge wrote them. A blob's hash stands beside its place. The index has every placement, by the number
of its adapter, so that nothing has to be resolved again; and the adapters' hashes and weights. Nothing is deflated, as
libraries differ in that; bzip2, by which a card is compressed, has one library, whose bytes its versions share.

A weight that was stored as codes may become numbers. `coded` of its entry has the codec's name, then, and the places
and hashes of stored tensors that follow its records unchanged: its companions, or all if its values were replaced. Its
records have the differences of the codes, as the codec orders them, to those nearest to W' - D. `declared`, the
quantization config of each component, is there if anything was coded: the codec finds its weights anew by it. A weight
that stays codes has an entry under their name, with `recoded`; its records have the same differences to its new codes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from ..adapters.adapter import Adapter
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.update import UpdateSpec
from ..binding.merge_plan import MergePlan
from ..binding.module_weights import record_weights
from ..binding.placement import Placement
from ..binding.resolve import refuse_second_nonadditive
from ..errors import InputError, NeedsFlag
from ..files.checkpoint import Checkpoint
from ..files.dtypes import DTYPES, FLOATS, TensorSpec
from ..files.fileio import copy_range, open_for_reading, write_at
from ..files.journal import StoredBytes
from ..files.model_card import shown_name
from ..files.output import Output
from ..files.side_files import CARD, has_card, is_of_whole
from ..files.undo_checks import coded_tiling, record_rows, spec_of, tiling
from ..files.undo_file import (
    END,
    HASH_PART,
    MAGIC,
    TRAILER,
    VERSION,
    UnrecordedBytes,
    card_packer,
    counted_rows,
    is_readable,
    kept_tensors,
    recoded_shape,
    recoded_tiling,
    unrecorded,
)
from ..files.weights_file import WeightsFile, copy_bytes, sha256_bytes
from .differences import UNIT, WIDEST


class UndoWriter:
    """Takes records in any order and writes them in the output's; until then they stand in the journal."""

    def __init__(self) -> None:
        self._records: dict[str, list[tuple[int, int, StoredBytes, str, int]]] = {}
        self._untouched: dict[str, dict[int, str]] = {}
        self._written: dict[str, list[str]] = {}

    def add(self, tensor: str, start: int, stop: int, record: StoredBytes, sha256: str, sum: int) -> None:
        """Add the record of rows start:stop of a tensor, with the hash of W and the sum of W'."""
        self._records.setdefault(tensor, []).append((start, stop, record, sha256, sum))

    def add_untouched(self, tensor: str, part: int, sha256: str) -> None:
        """Add the hash of a numbered part (64 MiB) of a tensor that is copied unchanged."""
        self._untouched.setdefault(tensor, {})[part] = sha256

    def unrecorded(self, plan: MergePlan, output: Output) -> list[UnrecordedBytes]:
        """Return the byte ranges of changed tensors that are in no record, to be hashed once all is written."""
        return [
            each
            for name, entry in make_index(plan, output)["tensors"].items()
            for each in unrecorded(name, entry, [record[:2] for record in self._records.get(name, [])])
        ]

    def add_written(self, part: UnrecordedBytes, sha256: str) -> None:
        """Add the hash of one of the ranges of `unrecorded`, in their order."""
        self._written.setdefault(part.tensor, []).append(sha256)

    def finish(self, target: BinaryIO, plan: MergePlan, output: Output) -> int:
        """Write the file, and return its size."""
        write_at(target, memoryview(MAGIC), 0)
        at = len(MAGIC)
        index = make_index(plan, output)
        index["untouched"] = {name: [each[part] for part in sorted(each)] for name, each in self._untouched.items()}
        for name, entry in index["tensors"].items():
            for start, stop, record, *checks in sorted(self._records.get(name, []), key=itemgetter(0)):
                copy_range(record.file, record.offset, target, at, record.nbytes)
                entry["records"].append([start, stop, at, record.nbytes, *checks])
                at += record.nbytes
            entry["written"] = self._written.get(name, [])
            if "copied" in entry:
                row = entry["copied"]
                place, at = _copy(plan.base, name, row, target, at)
                entry["copied"] = [row, *place]
            if "coded" in entry:
                for tensor in kept_tensors(plan.base.weights[name], entry):
                    place, at = _copy(plan.base, tensor, 0, target, at)
                    entry["coded"]["kept"].append(place)
        for owner, key in _blobs(index):
            data = owner[key]
            owner[key] = [at, len(data), hashlib.sha256(data).hexdigest()]
            write_at(target, memoryview(data), at)
            at += len(data)
        data = _encoded(index)
        end = TRAILER.pack(at, len(data), hashlib.sha256(data).digest(), END)
        write_at(target, memoryview(data + end), at)
        return at + len(data) + len(end)


FAR, HASH, WORDS = 1 << 48, "f" * 64, (1 << 64) - 1  # in the index of `largest_undo`: nothing takes more digits


def largest_undo(plan: MergePlan, output: Output) -> int:
    """Return the most bytes that the undo file of a merge can have: no number but the longest is stored of any weight.

    A merge that keeps most of the base's digits stores a hundredth of that, but only the weights tell.

    Raises:
        NeedsFlag: its index would be larger than any that is read.
    """
    index, size = make_index(plan, output), len(MAGIC) + TRAILER.size

    def hashes(nbytes: int) -> list[str]:
        return [HASH] * -(-nbytes // HASH_PART)

    copied = {name: spec.nbytes for name, spec in output.specs.items() if name not in plan.written and spec.nbytes}
    index["untouched"] = {name: hashes(nbytes) for name, nbytes in copied.items()}
    for name, entry in index["tensors"].items():
        places = list(_record_places(plan, name, entry))
        size += sum(_largest_record(plan, name, entry, *place) for place in places)
        entry["records"] = [[start, stop, FAR, FAR, HASH, WORDS] for _, start, stop in places]
        entry["written"] = [HASH for _ in unrecorded(name, entry, [place[1:] for place in places])]
        if "copied" in entry:
            was, row = plan.base.specs[name], entry["copied"]
            nbytes = was.nbytes - (row * (was.nbytes // was.shape[0]) if row else 0)
            size, entry["copied"] = size + nbytes, [row, FAR, hashes(nbytes)]
        if "coded" in entry:
            kept = [plan.base.stored[tensor].nbytes for tensor in kept_tensors(plan.base.weights[name], entry)]
            size, entry["coded"]["kept"] = size + sum(kept), [[FAR, hashes(nbytes)] for nbytes in kept]
    blobs = sum(len(owner[key]) for owner, key in _blobs(index))
    for owner, key in _blobs(index):
        owner[key] = [FAR, len(owner[key]), HASH]
    text = _encoded(index)
    if not is_readable(text, blobs):
        raise NeedsFlag(
            f"would need an undo file of {len(index['tensors']):,} changed tensors with {blobs:,} bytes of headers and "
            "side files, more than one can have",
            culprit=str(output.path),
            remedy="add --no-undo",
        )
    return size + blobs + len(text)


def _record_places(plan: MergePlan, name: str, entry: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Yield each record of a changed tensor: the first row of its run, and the rows that it starts and stops at."""
    if "recoded" in entry:
        height = record_rows(recoded_shape(entry)[1], True)
        for first, last in recoded_tiling(entry):
            yield from ((first, start, min(start + height, last)) for start in range(first, last, height))
    if "recoded" in entry or name not in plan.base.specs:
        return
    spec, was, weight = spec_of(entry["spec"]), plan.base.specs[name], plan.base.weights.get(name)
    if weight and entry["replaced"]:
        return
    if weight:
        runs = coded_tiling(name, spec, was, plan.base.stored[weight.tensors[0]], entry["placements"])
    else:
        runs, _ = tiling(name, spec, was, entry["placements"])
    height = record_rows(spec.size // max(1, counted_rows(entry)), bool(weight))
    for first, last in runs:
        yield from ((first, start, min(start + height, last)) for start in range(first, last, height))


def _largest_record(plan: MergePlan, name: str, entry: Mapping[str, Any], first: int, start: int, stop: int) -> int:
    """Return the most bytes of one record: a number of the stored type for each weight, and what precedes numbers."""
    if "recoded" in entry:
        name = entry["recoded"]["weight"]
        return _largest_codes(plan.base, name, (stop - start) * recoded_shape(entry)[1])
    was, weight = plan.base.specs[name], plan.base.weights.get(name)
    columns = spec_of(entry["spec"]).size // counted_rows(entry)
    count, norms = (stop - start) * columns, 0
    for p in plan.placements.get(name, ()) if not entry["replaced"] else ():
        axis = None if p.update.additive else p.update.cls.norm_axis(p.update, p.transposed)
        norms = max(norms, 8 * (stop - start) if axis == 0 else 8 * columns if axis == 1 and start == first else 0)
    if weight:
        return norms + _largest_codes(plan.base, name, count)
    if entry["replaced"] or was.dtype == "F64":
        return norms + count * DTYPES[was.dtype] // 8 + -(-count // UNIT)
    return norms + -(-count * (DTYPES[was.dtype] + 1) // 8)  # a bit tells of each that it is not 0.0


def _largest_codes(base: Checkpoint, name: str, count: int) -> int:
    """Return the most bytes of a record of so many weights of a coded one: WIDEST bits a code, padding included."""
    parts = base.parts_of(name)
    columns = parts.weight.spec.shape[-1]
    codes = -(-count // columns) * parts.weight.format.width(parts)
    return -(-codes * WIDEST // 8) + 3 * 16  # what begins and ends the three lists


def _blobs(index: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Return where the index of `make_index` has headers, side files and the card, as (owner, key)."""
    blobs = [(shard, "header") for shard in index["shards"] if shard["specs"] is None]
    blobs += [(index["side"], name) for name in sorted(index["side"])]
    return blobs + ([(index, "card")] if "card" in index else [])


def _encoded(index: Mapping[str, Any]) -> bytes:
    return json.dumps(index, sort_keys=True, separators=(",", ":")).encode()


def sort_adapters(adapters: Iterable[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """Sort adapters and weights by their hashes, so that the order does not depend on the command line."""
    return sorted(adapters, key=lambda p: (p[0].sha256, p[0].scales_sha256, p[1], p[0].module_weights))


def adapter_entry(adapter: Adapter, weight: float) -> dict[str, Any]:
    """Return the index's entry of an adapter, with weights of its modules only if some have their own."""
    entry = {"scales_sha256": adapter.scales_sha256, "sha256": adapter.sha256, "weight": weight}
    return {**entry, **record_weights(adapter.module_weights)}


def make_index(plan: MergePlan, output: Output) -> dict[str, Any]:
    """Return the index without its records, and with the headers and side files themselves in place of their places."""
    base = plan.base
    adapters = sort_adapters(plan.adapters)
    numbers = {id(adapter): number for number, (adapter, _) in enumerate(adapters)}
    inner = f"{base.folder.name}/" if base.outer else ""
    names = {*(name.removeprefix(inner) for name in output.extras), *plan.edits.files, *plan.edits.dropped} - {CARD}
    for model in () if base.given_as_file else base.models:
        names |= {model.prefix + name for name in ("config.json", *([model.index[0]] if model.index else []))}
    paths = {name: (base.root if is_of_whole(name) else base.folder) / name for name in sorted(names)}
    side = {name: _read(path) for name, path in paths.items() if path.is_file()}
    card = _read(base.root / CARD) if base.has_side_files and has_card(base.root) else None
    tensors = {name: _entry(plan, output, name, numbers) for name in output.specs if name in plan.written}
    coded = any("coded" in entry for entry in tensors.values())
    return {
        "version": VERSION,
        "arithmetic": json.loads(output.provenance)["arithmetic"],
        "adapters": [{"name": Path(shown_name(a.name)).name, **adapter_entry(a, w)} for a, w in adapters],
        "file": base.given_as_file,
        "shards": [_shard(shard) for shard in base.shards],
        "side": side,
        "new_side": sorted(names - side.keys()),
        "tensors": tensors,
        **({"declared": {part.prefix: part.declared for part in base.models}} if coded else {}),
        **({} if card is None else {"card": card_packer().compress(card), "card_bytes": len(card)}),
    }


def _shard(shard: WeightsFile) -> dict[str, Any]:
    header = shard.header
    specs = {name: [spec.dtype, list(spec.shape)] for name, spec in shard.specs.items()}
    name = (
        f"{shard.prefix}pytorch_model.bin" if shard.scattered else shard.place
    )  # which unmerge makes of several files
    return {"name": name, "header": header, "specs": specs if header is None else None}


def _copy(base: Checkpoint, name: str, row: int, target: BinaryIO, at: int) -> tuple[list[Any], int]:
    """Copy a stored tensor from a row on; return the copy's first byte with the hashes, and the byte after the last."""
    source, spec = base.shard_of[name], base.stored[name]
    first = row * (spec.nbytes // spec.shape[0]) if row else 0
    length = spec.nbytes - first
    copy_bytes(source, name, first, length, target, at)
    parts = range(0, length, HASH_PART)
    hashes = [sha256_bytes(source, name, first + part, min(HASH_PART, length - part)) for part in parts]
    return [at, hashes], at + length


def _read(path: Path) -> bytes:
    with open_for_reading(path) as file:
        return file.read()


def _entry(plan: MergePlan, output: Output, name: str, numbers: Mapping[int, int]) -> dict[str, Any]:
    spec = output.specs[name]
    entry: dict[str, Any] = {"spec": [spec.dtype, list(spec.shape)], "records": [], "placements": []}
    if plan.written[name] in plan.recoded:
        own = plan.written[name]
        placements = sorted((_placement(p, numbers) for p in plan.placements[own]), key=repr)
        codec, shape = plan.base.weights[own].codec.key, list(plan.base.specs[own].shape)
        recoded = {"weight": own, "shape": shape, "codec": codec}
        return {**entry, "placements": placements, "recoded": recoded, "replaced": False}
    source = plan.sources[name]
    if name not in plan.base.specs:
        return entry
    was, weight = plan.base.specs[name], plan.base.weights.get(name)
    entry["replaced"] = source != plan.base.ref(name)
    if weight:
        entry["coded"] = {"codec": weight.codec.key, "tensors": list(weight.tensors), "kept": []}
    elif entry["replaced"] and (was.dtype not in FLOATS or not was.shape or not was.size):
        entry["copied"] = 0
    elif entry["replaced"] and was.shape[0] > spec.shape[0]:
        entry["copied"] = spec.shape[0]
    if not entry["replaced"]:
        entry["placements"] = sorted((_placement(p, numbers) for p in plan.placements.get(name, ())), key=repr)
    return entry


def _placement(p: Placement, numbers: Mapping[int, int]) -> list[Any]:
    value = p.update.tensors["value"] if p.update.cls is ReplaceTensor else None
    # the first files of version 2 took norms of columns for norms of the transpose's rows
    place = [p.transposed is not p.update.along_inputs, p.rows, p.start, p.stop, p.skip, p.expert]
    return [numbers[id(p.adapter)], p.update.module, value, p.weight, *place]


def read_placements(
    index: Mapping[str, Any], tensor: str, spec: TensorSpec, adapters: Sequence[Adapter]
) -> list[Placement]:
    """Read the placements of a tensor.

    Args:
        adapters: in the order of the index

    Raises:
        InputError: an adapter is of another model.
    """
    found = []
    for number, module, value, weight, *place in index["tensors"][tensor]["placements"]:
        adapter = adapters[number]
        if module not in adapter.updates or (value is not None and value not in adapter.file.specs):
            raise InputError(f"has no {value or module}, which the undo file names", culprit=adapter.name)
        if value is None:
            update = adapter.updates[module]
            place[0] = bool(place[0]) is not update.along_inputs
        else:
            update = UpdateSpec(ReplaceTensor, module, {"value": value}, {"value": adapter.file.specs[value]})
        found.append(Placement(adapter, update, weight, *place))
        if spec.size and not _fits(found[-1], spec):
            raise InputError(f"{module} of {adapter.name} is not of the shape that the undo file says", culprit=tensor)
    refuse_second_nonadditive(tensor, found)
    return found


def _fits(placement: Placement, spec: TensorSpec) -> bool:
    """Return whether an update has the rows and columns that its placement takes."""
    update, shape = placement.update, placement.update.shape
    if update.cls.stack is not (placement.expert is not None):
        return False
    if update.cls.whole and not update.additive:
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
