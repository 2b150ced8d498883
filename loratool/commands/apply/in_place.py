"""Apply patches to a model where it is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ...durable.fileio import write_at
from ...durable.in_place import ModelInPlace, Move, Range, own_path
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.folder.side_files import is_patch
from ...files.hub.cache import place_named
from ...patches.chain import PatchChain
from ...patches.dialects.patch import ForeignChange, ForeignPatch
from ...patches.model_files import ModelFiles
from ...patches.side import read_side_file, side_names
from ...patches.sources import split_span
from ...streaming.digests import hashes_of_tensors
from ...streaming.in_place import WINDOW
from ...streaming.parallel import Progress, map_in_order, worker_count
from ...views.apply import ApplyReport
from ..arguments import parse_paths, parse_words
from ..in_place import (
    ELSEWHERE,
    Hashes,
    Planned,
    PlannedChange,
    base_facts,
    change_in_place,
    choose_way,
    files_of,
    refuse_inside,
    require_old,
    stage,
)
from ..predictions import opened_chain
from .call import Apply
from .command import check_chain
from .foreign import changed_pieces, changes_of, check_changes, identity_of_patch, open_patches, report_foreign
from .output import changed_tensors

ONE_WAY = "has no way back: the patch leads one way"


def apply_in_place(call: Apply) -> ApplyReport:
    """Apply patches to a model where it is."""
    if call.by == "shard":
        what = "patches change a model in place by windows of bytes"
        raise UsageError(what, culprit="--by", remedy=f"leave it out, or {ELSEWHERE}")
    path = own_path(call.base)
    return change_in_place(call, path, partial(_plan, call, path), partial(prepare_apply, call))


@dataclass(frozen=True)
class ByteWindow:
    """Bytes of a model's files that are written in one step. write: writes them, one range after the other."""

    ranges: Sequence[Range]
    write: Callable[[BinaryIO], None]


@dataclass(frozen=True)
class ByteWindows:
    """Bytes of a model that patches change. back: makes the same windows old; None if the patches lead one way."""

    windows: Sequence[ByteWindow]
    back: Callable[[ExitStack], Sequence[ByteWindow]] | None

    def make_new(self, model: ModelInPlace, progress: Progress | None) -> None:
        """Make all windows new that are old."""
        for number, window in enumerate(self.windows):
            if number not in model.windows:
                window.write(model.image)
                model.put_window(number, True, window.ranges, None)
            if progress:
                progress(number + 1, len(self.windows))

    def make_old(self, model: ModelInPlace) -> None:
        """Make all windows old that are new."""
        if self.back is None:
            raise InputError(ONE_WAY, culprit=str(model.path), remedy="end it forward: recover without --back")
        with ExitStack() as opened:
            windows = self.back(opened)
            for number in sorted(model.windows):
                windows[number].write(model.image)
                model.put_window(number, False, windows[number].ranges, None)


def _is_ours(call: Apply) -> bool:
    return call.step is None and any(map(is_patch, map(place_named, parse_paths(call.patches))))


def _plan(call: Apply, path: Path) -> Planned[ApplyReport]:
    workers = call.workers or worker_count()
    refuse_inside(map(place_named, parse_paths(call.patches)), path)
    with ExitStack() as opened:
        base = opened.enter_context(closing(open_checkpoint(call.base)))
        way = choose_way(base, path, "window")
        names = [file.name for file in files_of(base)]
        if _is_ours(call):
            patches = parse_paths(call.patches)
            chain = opened.enter_context(opened_chain(base, os.fspath(call.base), patches, call.reverse))
            _require_windows(chain, base)
            check_chain(chain, workers, call.progress)
            is_done = chain.reached == len(chain.patches)
            return Planned(_report(call, chain, done=is_done), way, names, is_done)
        foreign = _open_foreign(call, base, opened)
        check_changes(base, foreign.changes, call)
        return Planned(foreign.report(call), way, names)


def _require_windows(chain: PatchChain, base: Checkpoint) -> None:
    """Raise InputError unless the patches make the same files with other bytes, each span of itself alone."""
    first = chain.patches[0]
    was, now = ModelFiles.of(base), chain.files
    places: list[list[tuple[Any, ...]]] = [
        [(file.name, file.nbytes, file.head, dict(file.begin)) for file in each.files] for each in (was, now)
    ]
    if was.is_file:
        places = [[("", *rest) for _, *rest in each] for each in places]
    if 0 < chain.reached < len(chain.patches):
        what = f"has {chain.reached} of the patches behind it already"
        raise InputError(what, culprit=str(base.path), remedy="give those after them alone")
    if places[0] != places[1]:
        raise InputError("makes files of another layout", culprit=str(chain.last.path), remedy=ELSEWHERE)
    for patch in chain.patches:
        if patch.adapters or patch.cast or patch.new or patch.renamed or patch.spans != first.spans:
            what = "predicts its numbers from more than those that it changes"
            raise InputError(what, culprit=str(patch.path), remedy=ELSEWHERE)


@contextmanager
def prepare_apply(call: Apply, model: ModelInPlace) -> Iterator[PlannedChange[ApplyReport]]:
    """Open a model that is changed in place, and plan what the patches change."""
    with ExitStack() as opened:
        base = opened.enter_context(closing(open_checkpoint(model.model)))
        if not _is_ours(call):
            foreign = _open_foreign(call, base, opened)
            names = [name for name, changes in foreign.changes.items() if changes]
            base_facts(model, foreign.identity, files_of(base), partial(_hashes, base, names))
            if model.is_resumed:
                require_old(model, {name for number, name in enumerate(names) if number not in model.windows})
            windows = ByteWindows([*_foreign_windows(foreign, base)], None)
            yield PlannedChange(windows, partial(_finish_foreign, call, model, foreign))
            return
        paths, workers = parse_paths(call.patches), call.workers or worker_count()
        chain = opened.enter_context(opened_chain(base, str(model.path), paths, call.reverse, is_old=True))
        identity = hashlib.sha256("".join(patch.digest for patch in chain.patches).encode()).hexdigest()
        tensors = [each.name for each in changed_tensors(chain.files, [each.tensor_sizes() for each in chain.patches])]
        base_facts(model, identity, files_of(base), partial(_hashes, base, tensors))
        can_return = call.reverse or all(patch.reversible for patch in chain.patches)

        def back(stack: ExitStack) -> Sequence[ByteWindow]:
            other = stack.enter_context(opened_chain(base, str(model.path), paths, not call.reverse, is_old=True))
            return [*_windows(other, base, workers)]

        windows = ByteWindows([*_windows(chain, base, workers)], back if can_return else None)
        yield PlannedChange(windows, partial(_finish, call, model, chain, base))


def _hashes(base: Checkpoint, names: Iterable[str]) -> tuple[Hashes, Hashes]:
    return {}, hashes_of_tensors(base.shard_of, names, worker_count())


def _windows(chain: PatchChain, base: Checkpoint, workers: int) -> Iterator[ByteWindow]:
    """Yield the windows of a chain: spans that some patch changes, then what lies between the tensors."""
    names = dict(zip([file.name for file in chain.files.files], [file.name for file in files_of(base)], strict=True))
    places = {name: (names[file.name], file.begin[name]) for file in chain.files.files for name in file.specs}
    waiting: list[int] = []
    nbytes = 0
    for number, span in enumerate(chain.last.spans):
        rows = [patch.rows[number] for patch in chain.patches]
        if all(row.hash == row.source_hash for row in rows):
            continue
        if waiting and nbytes + span.nbytes > WINDOW:
            yield _window(chain, waiting, places, workers)
            waiting, nbytes = [], 0
        waiting.append(number)
        nbytes += span.nbytes
    if waiting:
        yield _window(chain, waiting, places, workers)
    ends = {patch.digest: patch for patch in chain.patches}
    both = [each.base or each.target for each in ends.values()] + [each.target for each in ends.values()]
    if all(each.files == both[0].files for each in both):
        return
    for file in chain.files.files:
        gaps = list(file.gaps())
        yield ByteWindow([(names[file.name], *gap) for gap in gaps], partial(_write_all, [memoryview(file.frame)]))


def _window(chain: PatchChain, numbers: Sequence[int], places: dict[str, tuple[str, int]], workers: int) -> ByteWindow:
    spans = [chain.last.spans[number] for number in numbers]
    ranges = []
    for piece in (piece for span in spans for piece in span.pieces):
        name, begin = places[piece.tensor]
        ranges.append((name, begin + piece.first, piece.length))

    def write(image: BinaryIO) -> None:
        with closing(map_in_order(chain.source.made, numbers, workers)) as made:
            parts = [part for span, (data, _) in zip(spans, made, strict=True) for part in split_span(span, data)]
        _write_all(parts, image)

    return ByteWindow(ranges, write)


def _write_all(parts: Sequence[memoryview], image: BinaryIO) -> None:
    done = 0
    for part in parts:
        write_at(image, part, done)
        done += len(part)


@dataclass(frozen=True)
class _Foreign:
    """Patches of other programs, and what they change of a model."""

    base: Checkpoint
    patches: Sequence[ForeignPatch]
    files: ModelFiles
    changes: Mapping[str, Sequence[ForeignChange]]

    @property
    def identity(self) -> str:
        return hashlib.sha256("".join(map(identity_of_patch, self.patches)).encode()).hexdigest()

    def report(self, call: Apply) -> ApplyReport:
        name = os.fspath(call.base)
        return report_foreign(name, self.patches, Path(name), self.files, self.changes, call)


def _open_foreign(call: Apply, base: Checkpoint, opened: ExitStack) -> _Foreign:
    if call.reverse:
        raise UsageError("patches of other programs lead one way", culprit="--reverse", remedy="keep the base")
    if call.step is not None:
        what = "begins with the newest full version, and not with the model that is in place"
        raise UsageError(what, culprit="--step", remedy=f"name the patches from its version on, or {ELSEWHERE}")
    _, patches = open_patches(parse_paths(call.patches), None, opened)
    files = ModelFiles.of(base)
    return _Foreign(base, patches, files, changes_of(patches, base, files, parse_words(call.allow)))


def _foreign_windows(foreign: _Foreign, base: Checkpoint) -> Iterator[ByteWindow]:
    """Yield a window for each changed tensor."""
    names = {shard.path: file.name for shard, file in zip(base.shards, files_of(base), strict=True)}
    for name, changes in foreign.changes.items():
        if changes:
            shard = base.shard_of[name]
            place = names[shard.path], shard.begin[name], base.stored[name].nbytes
            yield ByteWindow([place], partial(_write_pieces, foreign, name))


def _write_pieces(foreign: _Foreign, name: str, image: BinaryIO) -> None:
    done = 0
    for piece in changed_pieces(foreign.base, name, foreign.changes[name]):
        write_at(image, piece, done)
        done += len(piece)


def _finish(call: Apply, model: ModelInPlace, chain: PatchChain, base: Checkpoint) -> tuple[ApplyReport, list[Move]]:
    wanted = chain.side()
    before = {name: read_side_file(base, name) for name in side_names(base)}
    small: dict[str, bytes | Path | None] = {name: data for name, data in wanted.items() if before.get(name) != data}
    small |= dict.fromkeys(before.keys() - wanted.keys())
    return _report(call, chain, done=False), stage(model, small)


def _finish_foreign(call: Apply, model: ModelInPlace, foreign: _Foreign) -> tuple[ApplyReport, list[Move]]:
    return foreign.report(call), []


def _report(call: Apply, chain: PatchChain, done: bool) -> ApplyReport:
    name = os.fspath(call.base)
    return ApplyReport(
        base=name,
        patches=parse_paths(call.patches),
        out=name,
        dry_run=call.dry_run,
        nbytes=sum(file.nbytes for file in chain.files.files),
        tensors=len(chain.files.specs),
        spans=len(chain.last.spans),
        reverse=call.reverse,
        files=tuple(file.name for file in chain.files.files),
        done=done,
        checked=("sha256",),
        changed=changed_tensors(chain.files, [patch.tensor_sizes() for patch in chain.patches]),
        exists=False,
        digests={} if call.dry_run else {name: chain.digest},
    )
