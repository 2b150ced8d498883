"""Change tensors of a model in place, window by window, forward and back (`durable.in_place` has the protocol).

A window is a run of items of one file, so its bytes do not depend on those of another: a tensor whose rows need the
others, as the norms of DoRA's columns do, is in one window as a whole. Or a window is a whole file, which is written
beside the former one and renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from ..durable import disk
from ..durable.fileio import open_new, write_at
from ..durable.in_place import ModelInPlace, Range
from ..files.output.output import Output, OutputFile
from ..files.tensor_ref import TensorRef
from ..files.weights_file import WeightsFile
from ..numerics.arrays import Device
from .items import CopyBytes, FinishedItem, Item, MapRows
from .parallel import Progress
from .rewrite import ChangedTensor, file_items, in_batches, is_changed, parts_with_results
from .workers import Worker, run_items, run_threads

WINDOW = 1 << 26  # bytes: so many are written twice at a time

# Of each changed item: the tensor, its first row and the row after its last, and the results of its blocks
Results = list[list[Any]]

Place = CopyBytes | MapRows  # items that write to one place


@dataclass(frozen=True)
class Window:
    """Items of one file that are changed in one step; their targets are the model's files."""

    number: int
    file: OutputFile
    items: tuple[Place, ...]

    @property
    def ranges(self) -> list[Range]:
        """Return its bytes in the file; those that touch are one range."""
        ranges: list[Range] = []
        for item in self.items:
            if ranges and sum(ranges[-1][1:]) == item.target_offset:
                ranges[-1] = (self.file.name, ranges[-1][1], ranges[-1][2] + item.nbytes)
            else:
                ranges.append((self.file.name, item.target_offset, item.nbytes))
        return ranges


@dataclass(frozen=True)
class RowWindows:
    """Tensors of a model that change in place.

    Attributes:
        output: the model's files with their new headers; its tensors have the places that they have now, or each file
            is written anew.
        former: the files as they were.
        shards: the model's files as they are now, by name.
        stored: each tensor as it is in the model's files now.
        sources: the source of each tensor.
        changed: the tensors that change.
        whole: those of which no rows may change before all have been read.
        back: takes the tensors of some windows and the windows' results; returns the tensors with which their rows
            become what they were, and the sources of those that are not read as they are stored.
        check: raises an error for an item whose results must not be written.
        by_shard: each file is written anew.
    """

    output: Output
    former: Sequence[OutputFile]
    shards: Mapping[str, WeightsFile]
    stored: Mapping[str, TensorRef]
    sources: Mapping[str, TensorRef]
    changed: Mapping[str, ChangedTensor]
    whole: Collection[str]
    back: Callable[[Collection[str], Results], tuple[Mapping[str, ChangedTensor], Mapping[str, TensorRef]]]
    check: Callable[[MapRows, list[Any]], None]
    by_shard: bool
    device: Device
    workers: int

    def make_new(self, model: ModelInPlace, progress: Progress | None) -> None:
        """Make all windows new that are old."""
        done, total = 0, sum(self.output.specs[name].nbytes for name in self.changed)
        for window in self._windows():
            if window.number not in model.windows:
                self._put(model, window, True, self.changed)
            done += sum(item.nbytes for item in window.items if is_changed(item, self.changed))
            if progress:
                progress(min(done, total), total)

    def make_old(self, model: ModelInPlace) -> None:
        """Make all windows old that are new."""
        results = dict(model.results())
        files = {file.name: file for file in self.former}
        for window in self._windows():
            if window.number not in model.windows:
                continue
            moving = (each for each in window.items if is_changed(each, self.changed) or not _is_in_place(each))
            names = dict.fromkeys(item.tensor for item in moving if isinstance(item, MapRows))
            changed, sources = self.back(names, results[window.number])
            file = files[window.file.name]
            begin = file.begin if self.by_shard else {name: file.begin[name] for name in names}
            items = tuple(self._items(replace(file, begin=begin), changed, {**self.stored, **sources}))
            if not self.by_shard:
                items = tuple(item for item in items if _is_within(item, window.ranges))
            self._put(model, Window(window.number, file, items), False, changed)

    def _windows(self) -> Iterator[Window]:
        number, files = 0, {file.name: file for file in self.former}
        for file in self.output.files:
            waiting: list[Place] = []
            nbytes = 0
            is_new = file.header != files[file.name].header
            for item in self._items(file, self.changed, self.sources):
                last = waiting[-1] if waiting else None
                if isinstance(last, MapRows) and isinstance(item, MapRows) and last.tensor == item.tensor:
                    stays = item.tensor in self.whole
                else:
                    stays = False
                if not (stays or self.by_shard) and nbytes + item.nbytes > WINDOW and waiting:
                    yield Window(number, file, tuple(waiting))
                    number, waiting, nbytes = number + 1, [], 0
                waiting.append(item)
                nbytes += item.nbytes
                is_new = is_new or is_changed(item, self.changed) or not _is_in_place(item)
            if waiting and is_new:
                yield Window(number, file, tuple(waiting))
                number += 1

    def _items(
        self, file: OutputFile, changed: Mapping[str, ChangedTensor], sources: Mapping[str, TensorRef]
    ) -> Iterator[Place]:
        """Yield the items of a file; in windows only those that change bytes. Their target is the model's file now."""
        target = self.shards[file.name].file
        begin = {name: (target, first) for name, first in file.begin.items()}
        for item in file_items(self.output, file, target, sources, changed, begin.__getitem__, {}):
            assert isinstance(item, CopyBytes | MapRows)
            if self.by_shard or is_changed(item, changed) or not _is_in_place(item):
                yield item

    def _put(self, model: ModelInPlace, window: Window, is_new: bool, changed: Mapping[str, ChangedTensor]) -> None:
        """Compute a window, and put it into the model."""
        if not self.by_shard:
            done, items = 0, list[Place]()
            for item in window.items:
                items.append(replace(item, target=model.image, target_offset=done))
                done += item.nbytes
            ranges = window.ranges  # before the results are in memory
            model.put_window(window.number, is_new, ranges, self._run(items, is_new, changed))
            return
        place = model.new_file()
        with open_new(place) as target:
            disk.truncate(target, window.file.nbytes)
            write_at(target, memoryview(window.file.header), 0)
            results = self._run([replace(item, target=target) for item in window.items], is_new, changed)
            disk.sync(target)
        shard = self.shards[window.file.name]
        shard.close()  # its space is free only then
        model.put_file(window.number, is_new, window.file.name, results)
        shard.open_again(model.place(window.file.name))

    def _run(self, items: Sequence[Place], is_new: bool, changed: Mapping[str, ChangedTensor]) -> Results:
        results: Results = []
        planned = enumerate(in_batches(items))
        if self.by_shard:
            nbytes = sum(item.nbytes for item in items)
            runs = run_items((item for _, item in planned), range(1 << 60), self.device, self.workers, nbytes)
        else:
            runs = run_threads(planned, self._worker, self.workers, ahead=1)
        with closing(runs) as finished:
            for _, item, outcome in finished:
                assert not isinstance(item, FinishedItem) and outcome.results is not None
                for part, of_part in parts_with_results(item, outcome.results):
                    if is_new and isinstance(part, MapRows) and is_changed(part, changed):
                        self.check(part, of_part)
                        results.append([part.tensor, part.start, part.stop, of_part])
        return results

    def _worker(self) -> Callable[[Any], Any]:
        return Worker(self.device)


def _is_in_place(item: Item) -> bool:
    """Return whether an item writes what is there."""
    if isinstance(item, CopyBytes):
        return item.source is item.target and item.source_offset == item.target_offset
    if not isinstance(item, MapRows) or item.scattered or item.source.weight or item.source.span:
        return False
    file, name = item.source.file, item.source.name
    is_own = file.file is item.target and not file.is_computed(name) and item.columns == item.target_columns
    width = item.target_columns * item.itemsize
    return is_own and file.begin[name] + item.start * width == item.target_offset


def _is_within(item: Place, ranges: Sequence[Range]) -> bool:
    first, last = item.target_offset, item.target_offset + item.nbytes
    return any(start <= first and last <= start + nbytes for _, start, nbytes in ranges)
