"""Rewrite a checkpoint: chosen tensors pass through a step by blocks of rows, all others are copied or cast.

Every command that writes a model streams it through here. The output's layout becomes independent items for
`workers.run_items`, and only the blocks under way are in memory. A journal records each item's output and results, so
that a run that died can resume, and torchrun's ranks can share the items. If the output goes to a store, they share its
files: each builds whole files in a folder of its own, hashes and sends them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, TypeGuard

from ..durable.elsewhere import source_behind
from ..durable.fileio import write_at, write_back_early
from ..durable.journal import Journal, Place
from ..errors import InputError, NeedsFlag
from ..files.digest import pieces_of
from ..files.dtypes import DTYPES, TensorSpec
from ..files.output.output import Output, OutputFile, join_output, open_output
from ..files.stores.outgoing import Outgoing, OutgoingFile, outgoing_of
from ..files.tensor_ref import TensorRef
from ..files.weights_file import PlacedTensors, WeightsFile
from ..numerics.arrays import Device
from ..numerics.forms import F32, FORMS, fraction
from ..numerics.rounding_stats import RoundingStats, cast_rounded
from ..undo.reader import belongs
from ..undo.records import Doubted, RecordedBlock
from .digests import TensorHashes, WrittenPieces
from .items import (
    Batching,
    CopyBytes,
    FinishedItem,
    GatherBytes,
    HashBatch,
    HashBytes,
    Item,
    Locate,
    MapBatch,
    MapRows,
    Prepare,
    Step,
    each_part,
)
from .journaled import WRITTEN, journaled, read_others, send_records
from .parallel import Progress
from .ranks import Job, current_job
from .scattered import Scattered, Strided
from .workers import run_items

# A name in a journal -> the type of a step's results
RESULTS = {kind.__name__: kind for kind in (RoundingStats, RecordedBlock, Doubted, Strided)}

# A type -> the --dtype that holds numbers that overflow in it
WIDER = {"F16": "fp32", "BF16": "fp32", "F8_E4M3": "bf16", "F8_E5M2": "bf16"}

LARGEST_FLOAT32 = float(fraction(F32.inf - 1, F32))

CAST_BLOCK = 1 << 17  # numbers cast at a time

COPY_ITEM = 1 << 26  # bytes copied by an item: few enough to report progress and to stop soon

ROWS_ITEM = 1 << 22  # weights of a matrix in an item

BATCH = 1 << 18  # numbers of small tensors in an item: with so many, the calls cost little beside the arithmetic

MIN_ROWS = 256  # least rows of an item: preparing a step costs as much as a few rows


@dataclass(frozen=True)
class RowRange:
    """Rows start:stop of a tensor as a matrix, and the step that changes them."""

    start: int
    stop: int
    prepare: Prepare
    block_rows: int  # rows of a block
    item_rows: int = 0  # rows of an item, 0 for as many as suit the machine
    batching: Batching | None = None  # if these are all rows of a small tensor


@dataclass(frozen=True)
class CopiedRows:
    """Rows start:stop of a tensor, copied from byte `offset` of another file."""

    start: int
    stop: int
    file: BinaryIO
    offset: int


@dataclass(frozen=True)
class ChangedTensor:
    """A tensor that changes, as a matrix of `rows` rows; `ranges` yields the changed rows, in rising order."""

    rows: int
    ranges: Callable[[], Iterable[RowRange | CopiedRows]]
    columns: int = 0  # of the source; 0 for as many as the output has
    scattered: Scattered | None = None  # if the steps write codes; the ranges are then all rows


def rewrite(
    output: Output,
    sources: Mapping[str, TensorRef],
    changed: Mapping[str, ChangedTensor],
    device: Device,
    workers: int,
    progress: Progress | None = None,
    finish: Callable[[Mapping[str, BinaryIO]], Mapping[str, bytes]] | None = None,
    hashes: TensorHashes | None = None,
) -> Generator[tuple[MapRows, list[Any]], None, None]:
    """Write `output`, whose layout is planned, and yield each item of a changed tensor with the results of its steps.

    The items of a tensor come in any order. Rank 0 gets the items of all ranks, another rank its own. If the run dies,
    the partial output and its journal stay. After any other error, or if the caller closes the generator early, nothing
    stays.

    Args:
        sources: the source of each tensor's rows, except tensors that the steps of others write; rows in no range of a
            changed tensor are copied or cast
        finish: called on rank 0 with the open files, by name, when all rows are written; returns, by name, the output's
            small files whose content depends on the results
        hashes: what is hashed on the way; complete on rank 0 when `finish` is called

    Raises:
        NeedsFlag, InputError: a cast overflows.
        UsageError: the journal to resume has other inputs or options.
        RankDone: on ranks other than 0, when their items are written.
    """
    output.require_space()
    job, side_files = current_job(), dict[str, bytes]()
    is_apart = job.count > 1 and outgoing_of(output.path) is not None  # each rank has files of its own
    own_files = list[OutputFile]() if is_apart else [*output.files]
    written: dict[BinaryIO, list[tuple[int, int, int]]] = defaultdict(list)  # of checked items: offset, length, CRC-32
    with _opened(output, side_files, job) as (journal, targets), ExitStack() as hashing, ExitStack() as writing:
        names = {file: name for name, file in targets.items()}

        groups = partial(_groups, output, sources, changed, targets, hashes.read if hashes else {}, is_apart)

        def items() -> Iterator[Item]:
            return _items(output, [each for _, each in groups()])

        hashed, begin = None, {name: first for file in output.files for name, first in file.begin.items()}
        if hashes and (is_apart or not job.rank):
            hashed = hashing.enter_context(closing(_hashed_after_writing(hashes, output, targets, workers)))

        def step_results(item: Item, results: list[Any], is_here: bool) -> Iterator[tuple[MapRows, list[Any]]]:
            for part, of_part in parts_with_results(item, results):
                if isinstance(part, HashBytes):
                    if hashes:
                        hashes.of_read[part.tensor][part.part] = of_part[0]
                    continue
                if part.checked:
                    written[part.target].append((part.target_offset, part.nbytes, of_part.pop(0)))
                if sender and is_here:
                    sender.wrote(part, of_part)
                if _is_scattered(part):
                    del of_part[0]  # its places
                elif hashed and is_here and isinstance(part, MapRows):
                    hashed.wrote(part.tensor, part.target_offset - begin[part.tensor], part.nbytes)
                if is_changed(part, changed):
                    yield part, of_part
                elif isinstance(part, MapRows):
                    refuse_overflow(part.tensor, of_part, sources, output)

        sender = _Sender.of(output, targets, hashed, job)
        done_here = set[int]()  # the numbers of this rank's items
        planned = _without_finished(items(), journal, names)
        worth = 0 if _reads_elsewhere(output) else output.nbytes  # forks would not share what is read ahead
        numbers = _numbers_of(groups(), job.numbers("files"), own_files) if is_apart else job.numbers("items")
        runs = writing.enter_context(closing(run_items(planned, numbers, device, workers, worth)))
        writing.enter_context(write_back_early(targets.values()))
        for number, planned_item, done in runs:
            item = planned_item.item if isinstance(planned_item, FinishedItem) else planned_item
            if done.results is None:
                results = journal.results(number)
            else:
                results = journal.add(number, _place_of(item, names), done.digest, done.results)
            done_here.add(number)
            yield from step_results(item, results, is_here=True)
            done_bytes = job.add("bytes", item.nbytes)
            if progress:
                progress(done_bytes, output.nbytes)
        writing.close()
        if job.rank:
            send_records(WRITTEN, job, journal)
            if not is_apart:
                return  # `journaled` raises RankDone, once this rank's output is synced
        else:
            read_others(job, journal)
            for number, item in enumerate(items() if job.count > 1 else ()):
                if number not in done_here:
                    yield from step_results(item, journal.results(number), is_here=not is_apart)
        for file in own_files:
            target = targets[file.name]
            for offset, data in file.archive.rest(written[target]) if file.archive else ():
                write_at(target, memoryview(data), offset)
        if hashes and hashed:
            hashes.of_written.update(hashed.finish(name for file in own_files for name in file.begin))
        if sender:
            sender.settle(own_files)
        if is_apart:
            for text in job.gather("hashes", json.dumps(hashes.of_written if hashes else {})):
                if hashes:
                    hashes.of_written.update(json.loads(text))
        if finish:
            side_files.update(finish(targets))


@dataclass(frozen=True)
class _Sender:
    """Tells the files that go to a store what is written; a file's upload begins with its first bytes."""

    outgoing: Outgoing
    output: Output
    files: Mapping[BinaryIO, OutputFile]
    hashed: WrittenPieces | None
    begun: dict[BinaryIO, OutgoingFile] = field(init=False, default_factory=dict)

    @classmethod
    def of(
        cls, output: Output, targets: Mapping[str, BinaryIO], hashed: WrittenPieces | None, job: Job
    ) -> _Sender | None:
        """Return what sends an output's files; None if they stay here."""
        outgoing = outgoing_of(output.path)
        if not outgoing:
            return None
        if job.count > 1:
            places = [*map(output.place_of, output.files)]
            outgoing.join(json.loads(job.on_rank0("uploads", lambda: json.dumps(outgoing.reserve(places)))))
        return cls(outgoing, output, {targets[file.name]: file for file in output.files}, hashed)

    def _file(self, target: BinaryIO) -> OutgoingFile:
        if target not in self.begun:
            file = self.files[target]
            extents = [(begin, begin + self.output.specs[name].nbytes, name) for name, begin in file.begin.items()]
            spans = [] if file.archive else [extent[:2] for extent in extents]
            is_read = partial(_is_hashed_later, self.hashed, sorted(extents)) if self.hashed else None
            place = self.output.place_of(file)
            self.begun[target] = self.outgoing.begin(place, target, file.nbytes, spans, is_read)
        return self.begun[target]

    def wrote(self, part: CopyBytes | GatherBytes | MapRows, results: list[Any]) -> None:
        places: Iterable[tuple[BinaryIO, int, int]] = [(part.target, part.target_offset, part.nbytes)]
        if isinstance(part, MapRows) and part.scattered:
            places = part.places(results[0])
        for target, offset, nbytes in places:
            if not self.files[target].archive:  # some bytes between its tensors are only known at the end
                self._file(target).wrote(offset, offset + nbytes)

    def settle(self, own_files: Collection[OutputFile]) -> None:
        """Send the rest of the files that are wholly written here; other ranks send the others."""
        for target, file in self.files.items():
            if file in own_files:
                self._file(target).settle()
            else:
                self.outgoing.leave(self.output.place_of(file), file.nbytes)


def _is_hashed_later(hashed: WrittenPieces, extents: list[tuple[int, int, str]], first: int, end: int) -> bool:
    """Return whether bytes of a file are still to be hashed. extents: first byte, end and name of each tensor."""
    for begin, stop, name in extents[max(0, bisect_right(extents, (first,)) - 1) :]:
        if begin >= end:
            return False
        if stop > first and not hashed.is_hashed(name, max(0, first - begin), min(stop, end) - begin):
            return True
    return False


def _hashed_after_writing(
    hashes: TensorHashes, output: Output, targets: Mapping[str, BinaryIO], workers: int
) -> WrittenPieces:
    """Return what hashes the chosen tensors of an output as they are written."""
    tensors: dict[str, WeightsFile] = {}
    for file in output.files:
        specs = {name: output.specs[name] for name in file.begin if name in hashes.written}
        opened = PlacedTensors(output.path / file.name, targets[file.name], specs, dict(file.begin))
        tensors |= dict.fromkeys(specs, opened)
    return WrittenPieces(tensors, workers)


def _opened(
    output: Output, side_files: Mapping[str, bytes], job: Job
) -> AbstractContextManager[tuple[Journal, Mapping[str, BinaryIO]]]:
    """Open an output and its journal, as `journaled` does. Beside the weights, all files are rank 0's."""
    own = replace(output, undo=None, carried={}, side_files={}, extras={}) if job.rank else output
    return journaled(
        output.path,
        RESULTS,
        output.head(),
        output.resume,
        job,
        partial(open_output, own, side_files, belongs),
        partial(join_output, output),
        is_resumable=bool(output.call),
    )


def _without_finished(
    items: Iterable[Item], journal: Journal, names: Mapping[BinaryIO, str]
) -> Iterator[Item | FinishedItem]:
    """Yield the items; those that an earlier run has finished are each a `FinishedItem`."""
    for number, item in enumerate(items):
        record = journal.finished.get(number)
        is_same = record and record.place == _place_of(item, names)
        if record and is_same:
            places = journal.results(number)[0] if _is_scattered(item) else ()
            yield FinishedItem(item, record.digest, places)
        else:
            yield item


def _is_scattered(item: Item) -> bool:
    return isinstance(item, MapRows) and item.scattered is not None


def _place_of(item: Item, names: Mapping[BinaryIO, str]) -> Place:
    """Return the place that an item writes, or, for a hash, the place that it reads."""
    first = each_part(item)[0]
    if isinstance(first, HashBytes):
        return first.tensor, first.first, sum(part.length for part in each_part(item))
    return names[first.target], first.target_offset, item.nbytes


def parts_with_results(
    item: Item, results: list[Any]
) -> Iterable[tuple[CopyBytes | GatherBytes | MapRows | HashBytes, Any]]:
    """Return each part of a batch with its results, or another item with its own."""
    return zip(each_part(item), results if isinstance(item, MapBatch | HashBatch) else [results], strict=True)


def refuse_overflow(
    tensor: str, blocks: Collection[RoundingStats], sources: Mapping[str, TensorRef], output: Output
) -> None:
    """Raise if weights became infinite: NeedsFlag if --dtype fp32 would hold them, otherwise InputError."""
    count, largest = sum(block.overflowed for block in blocks), max((block.largest for block in blocks), default=0.0)
    if not count:
        return
    source, new = sources[tensor], output.specs[tensor].dtype
    message = f"{count} weights become infinite in {new}"
    if new == "F8_E4M3":
        message = f"{count} weights are beyond the largest number of {new}"
    if largest < LARGEST_FLOAT32 and new in WIDER:
        flags = f"--dtype {WIDER[new]}" + " --no-undo" * bool(output.undo)
        raise NeedsFlag(message, culprit=tensor, flags=flags, why=", which holds them")
    remedy = "is this the adapter's base, and its alpha right?"
    if source.weight:
        remedy = f"are its scales damaged? It can have such numbers only as codes ({source.weight.kind})"
    elif source.spec.dtype != new:
        remedy = f"leave out --dtype: {source.spec.dtype} holds them"
    raise InputError(message, culprit=tensor, remedy=remedy)


def _groups(
    output: Output,
    sources: Mapping[str, TensorRef],
    changed: Mapping[str, ChangedTensor],
    targets: Mapping[str, BinaryIO],
    hashed: Mapping[str, WeightsFile],
    is_apart: bool,
) -> list[tuple[list[OutputFile], Iterator[Item]]]:
    """Return the output's items in groups, each with the files that no other group writes; first those of no file.

    Args:
        hashed: the tensors to hash, and the file of each; one that the output has too is read when that is made.
        is_apart: files that one item can write are in one group.
    """
    others = ({name: file} for name, file in hashed.items() if name not in output.specs)
    begin = {name: (targets[file.name], offset) for file in output.files for name, offset in file.begin.items()}

    def items_of(file: OutputFile) -> Iterator[Item]:
        return in_batches(file_items(output, file, targets[file.name], sources, changed, begin.__getitem__, hashed))

    together = _written_together(output.files, changed) if is_apart else [[file] for file in output.files]
    return [
        ([], in_batches(chain.from_iterable(_hash_items(each) for each in others))),
        *((files, chain.from_iterable(map(items_of, files))) for files in together),
    ]


def _written_together(files: Sequence[OutputFile], changed: Mapping[str, ChangedTensor]) -> list[list[OutputFile]]:
    """Return the files in groups of neighbours: codes, and the tensors beside them, can be in several files."""
    number = {name: at for at, file in enumerate(files) for name in file.begin}
    inside = set[int]()  # numbers of files that belong to the group of the one before
    for each in changed.values():
        if each.scattered:
            found = [number[name] for name in each.scattered.tensors if name in number]
            inside.update(range(min(found) + 1, max(found) + 1))
    groups: list[list[OutputFile]] = []
    for at, file in enumerate(files):
        if at in inside:
            groups[-1].append(file)
        else:
            groups.append([file])
    return groups


def _numbers_of(
    groups: Iterable[tuple[list[OutputFile], Iterator[Item]]], drawn: Iterator[int], own_files: list[OutputFile]
) -> Iterator[int]:
    """Yield the numbers of the items of those groups whose numbers are drawn, and add their files to `own_files`."""
    own, first = next(drawn), 0
    for number, (files, items) in enumerate(groups):
        count = sum(1 for _ in items)
        if number == own:
            own_files += files
            yield from range(first, first + count)
            own = next(drawn)
        first += count


def _items(output: Output, waiting: list[Iterator[Item]]) -> Iterator[Item]:
    """Yield the items of groups, one of each in turn, since threads that write to one file wait for its lock.

    If an input is elsewhere, or the output goes elsewhere, one file follows the other, so that few files are read ahead
    or kept until they are sent.
    """
    if outgoing_of(output.path) or _reads_elsewhere(output):
        waiting = [chain.from_iterable(waiting)]
    while waiting:
        for source in list(waiting):
            item = next(source, None)
            if item is None:
                waiting.remove(source)
            else:
                yield item


def _reads_elsewhere(output: Output) -> bool:
    return any(source_behind(member.file) for file in output.inputs for member in file.members)


def is_changed(item: Item, changed: Mapping[str, ChangedTensor]) -> TypeGuard[MapRows]:
    return isinstance(item, MapRows) and item.tensor in changed and item.prepare is not _prepare_cast


def _hash_items(hashed: Mapping[str, WeightsFile]) -> Iterator[HashBytes]:
    for name, file in hashed.items():
        for part, place in enumerate(pieces_of(file.specs[name])):
            yield HashBytes(name, part, file, *place)


def file_items(
    output: Output,
    file: OutputFile,
    target: BinaryIO,
    sources: Mapping[str, TensorRef],
    changed: Mapping[str, ChangedTensor],
    locate: Locate,
    hashed: Mapping[str, WeightsFile],
) -> Iterator[Item | HashBytes]:
    """Yield the items of one file in the order of its bytes; copies that continue each other are one item."""
    span: CopyBytes | None = None
    checked = file.archive is not None
    for name, offset in file.begin.items():
        if name in hashed:
            yield from _hash_items({name: hashed[name]})
        if name not in sources:
            continue
        source, new = sources[name], output.specs[name]
        place = _Place(name, new, target, offset, checked)
        if name in changed and new.size:
            yield from _changed_items(source, place, changed[name], locate)
            continue
        computed = source.weight or source.spec.dtype != new.dtype or source.file.is_computed(source.name)
        if computed and new.size:
            yield from _row_items(source, place, 1, 1, _cast_rows(0, new.size, 1))
            continue
        if source.file.scattered:
            yield from _gather_items(GatherBytes(source.file, source.name, 0, target, offset, new.nbytes, checked))
            continue
        for origin, begin, nbytes in source.file.extents(source.name):
            copy = CopyBytes(origin, begin, target, offset, nbytes, checked)
            offset += nbytes
            if span and span.source is copy.source and span.end == (copy.source_offset, copy.target_offset):
                span = replace(span, nbytes=span.nbytes + copy.nbytes)
            else:
                yield from _copy_items(span)
                span = copy
    yield from _copy_items(span)


def in_batches(items: Iterable[Item | HashBytes]) -> Iterator[Item]:
    """Yield items, but small ones in batches once there are enough alike; and hashes in pairs of equal length."""
    small: dict[Hashable, list[MapRows]] = {}
    hashes: dict[int, list[HashBytes]] = {}  # by length; small ones together
    nbytes: dict[int, int] = defaultdict(int)  # of these
    for item in items:
        if isinstance(item, MapRows) and item.batching:
            alike = item.batching.alike, item.source.form, item.written, item.stop - item.start, item.columns
            waiting = small.setdefault(alike, [])
            waiting.append(item)
            if (len(waiting) + 1) * item.batching.size > BATCH:
                yield MapBatch(tuple(small.pop(alike)))
        elif isinstance(item, HashBytes):
            length = item.length if item.length > BATCH else 0
            together = hashes.setdefault(length, [])
            together.append(item)
            nbytes[length] += item.length
            if len(together) > 1 and nbytes[length] > BATCH:
                nbytes[length] = 0
                yield HashBatch(tuple(hashes.pop(length)))
        else:
            yield item
    yield from (MapBatch(tuple(items)) for items in small.values())
    yield from (HashBatch(tuple(items)) for items in hashes.values())


@dataclass(frozen=True)
class _Place:
    """The place of a tensor in an output file."""

    name: str
    spec: TensorSpec
    target: BinaryIO
    offset: int
    checked: bool


def _changed_items(source: TensorRef, place: _Place, changed: ChangedTensor, locate: Locate) -> Iterator[Item]:
    """Yield the items of one tensor: its ranges, and the rows between them, which are copied or cast."""
    if changed.scattered:
        yield from _scattered_items(source, place, changed, changed.scattered, locate)
        return
    written = place.spec.size // changed.rows
    columns = changed.columns or written
    end = _cast_rows(changed.rows, changed.rows, columns)
    done = 0
    for part in chain(changed.ranges(), (end,)):
        yield from _row_items(source, place, columns, written, _cast_rows(done, part.start, columns))
        if isinstance(part, CopiedRows):
            width = written * DTYPES[place.spec.dtype] // 8
            offset, size = place.offset + part.start * width, (part.stop - part.start) * width
            yield from _copy_items(CopyBytes(part.file, part.offset, place.target, offset, size, place.checked))
        else:
            yield from _row_items(source, place, columns, written, part)
        done = part.stop


def _scattered_items(
    source: TensorRef, place: _Place, changed: ChangedTensor, how: Scattered, locate: Locate
) -> Iterator[Item]:
    for part in changed.ranges():
        assert isinstance(part, RowRange)
        for start in range(part.start, part.stop, part.item_rows):
            stop = min(start + part.item_rows, part.stop)
            yield MapRows(
                tensor=place.name,
                source=source,
                columns=changed.columns,
                target=place.target,
                target_offset=place.offset,
                written=how.dtype,
                target_columns=how.width,
                start=start,
                stop=stop,
                prepare=part.prepare,
                block_rows=part.block_rows,
                scattered=(how, locate, changed.rows),
            )


def _copy_items(span: CopyBytes | None) -> Iterator[CopyBytes]:
    if span is None:
        return
    for start in range(0, span.nbytes, COPY_ITEM):
        size = min(COPY_ITEM, span.nbytes - start)
        source_offset, target_offset = span.source_offset + start, span.target_offset + start
        yield replace(span, source_offset=source_offset, target_offset=target_offset, nbytes=size)


def _gather_items(span: GatherBytes) -> Iterator[GatherBytes]:
    for start in range(0, span.nbytes, COPY_ITEM):
        size = min(COPY_ITEM, span.nbytes - start)
        yield replace(span, first=start, target_offset=span.target_offset + start, nbytes=size)


def _row_items(source: TensorRef, place: _Place, columns: int, written: int, rows: RowRange) -> Iterator[MapRows]:
    step = rows.item_rows or max(MIN_ROWS, ROWS_ITEM // columns)
    for start in range(rows.start, rows.stop, step):
        new = FORMS[place.spec.dtype]
        yield MapRows(
            tensor=place.name,
            source=source.as_stored(new.name),
            columns=columns,
            target=place.target,
            target_offset=place.offset + start * written * new.itemsize,
            written=new,
            target_columns=written,
            start=start,
            stop=min(start + step, rows.stop),
            prepare=rows.prepare,
            block_rows=rows.block_rows,
            checked=place.checked,
            batching=rows.batching,
        )


def cast_in_blocks(rows: int, blocks: Iterable[tuple[int, int]]) -> ChangedTensor:
    """Return a tensor whose rows are cast, or copied if they are computed as they are read, in these blocks.

    Args:
        blocks: (first row, row after the last), rising.
    """
    return ChangedTensor(
        rows, lambda: [RowRange(start, stop, _prepare_cast, stop - start, stop - start) for start, stop in blocks]
    )


def _cast_rows(start: int, stop: int, columns: int) -> RowRange:
    return RowRange(start, stop, _prepare_cast, max(1, CAST_BLOCK // columns))


def _prepare_cast(start: int, stop: int) -> Step:
    return lambda base, row, out, work: cast_rounded(base, out, work)
