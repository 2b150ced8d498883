"""Apply patches of other programs: each tensor passes through all changes of it, piece by piece."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ...durable.fileio import read_into, write_at
from ...durable.journal import Journal
from ...errors import InputError, UsageError, without_credentials
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.hub.cache import place_named
from ...files.output.output import Output, join_output, open_output
from ...files.output.paths import check_output_path
from ...files.weights_file import paths_of, read_parts
from ...patches.dialects.chains import find_chain
from ...patches.dialects.patch import ForeignChange, ForeignPatch
from ...patches.dialects.table import open_foreign_patch
from ...patches.model_files import ModelFiles
from ...patches.side import read_side_file, side_names
from ...streaming.journaled import Task, journaled, run_tasks
from ...streaming.parallel import counting, worker_count
from ...streaming.ranks import current_job
from ...undo.reader import belongs
from ...views.apply import ApplyReport
from ..arguments import parse_paths, parse_words
from .call import Apply
from .output import changed_tensors, choose_output_path, describe_output, write_frame

PART = 1 << 20  # bytes that are read back at a time


def apply_foreign(call: Apply) -> ApplyReport:
    """Make a model of another by patches of other programs.

    Raises:
        InputError: a patch is damaged, of another model, or does not follow from the one before.
        NeedsFlag: it could be applied with a word in `allow`.
    """
    if call.reverse:
        raise UsageError("patches of other programs lead one way", culprit="--reverse", remedy="keep the base")
    names, allow = parse_paths(call.patches), parse_words(call.allow)
    with ExitStack() as opened:
        full, patches = open_patches(names, call.step, opened)
        base = opened.enter_context(closing(open_checkpoint(full or call.base)))
        files = ModelFiles.of(base)
        changes = changes_of(patches, base, files, allow)
        path, is_file = choose_output_path(call, files)
        side = {name: read_side_file(base, name) for name in side_names(base)}
        inputs = paths_of([*base.shards, *(file for patch in patches for file in patch.files)])
        exists = check_output_path(path, is_file, inputs, call.force, True, side, call.dry_run)
        chosen = {f"patch {number}": identity_of_patch(patch) for number, patch in enumerate(patches, 1)}
        read = [*base.shards, *(file for patch in patches for file in patch.files)]
        output = describe_output(path, files, side, read, call, chosen)
        if call.dry_run:
            check_changes(base, changes, call)
        else:
            _write(output, files, base, changes, call)
        return report_foreign(os.fspath(full or call.base), patches, path, files, changes, call, exists)


def report_foreign(
    base: str,
    patches: Sequence[ForeignPatch],
    path: Path,
    files: ModelFiles,
    changes: Mapping[str, Sequence[ForeignChange]],
    call: Apply,
    exists: bool = False,
) -> ApplyReport:
    """Return the report of applied patches. path: of the output."""
    return ApplyReport(
        base=without_credentials(base),
        patches=tuple(without_credentials(str(patch.path)) for patch in patches),
        out=str(path),
        dry_run=call.dry_run,
        nbytes=sum(file.nbytes for file in files.files),
        tensors=len(files.specs),
        spans=sum(map(bool, changes.values())),
        reverse=False,
        files=tuple(file.name for file in files.files),
        done=False,
        checked=_checks(changes),
        changed=changed_tensors(
            files, [{name: sum(each.nbytes for each in some) for name, some in changes.items() if some}]
        ),
        exists=exists,
    )


def changes_of(
    patches: Sequence[ForeignPatch], base: Checkpoint, files: ModelFiles, allow: Sequence[str]
) -> dict[str, list[ForeignChange]]:
    """Return the changes of each tensor by patches one after the other.

    Raises:
        InputError: a patch is damaged, of another model, or does not follow from the one before.
        NeedsFlag: it could be applied with a word in `allow`.
    """
    _require_links(patches)
    steps = [patch.require(base.stored, allow) for patch in patches]
    _refuse_other_names(base, steps, files)
    return {name: [step[name] for step in steps if name in step] for name in files.specs}


def open_patches(names: Sequence[str], step: int | None, opened: ExitStack) -> tuple[Path | None, list[ForeignPatch]]:
    """Open the patches, or those in a folder that lead to a version; return the full version that they begin with."""
    if step is None:
        return None, [opened.enter_context(closing(open_foreign_patch(place_named(name)))) for name in names]
    if len(names) > 1:
        raise UsageError("--step is for one folder of versions", culprit=names[1])
    chain = opened.enter_context(closing(find_chain(place_named(names[0]), step)))
    return chain.full, [*chain.patches]


def identity_of_patch(patch: ForeignPatch) -> str:
    """Return what tells a patch from another at its path, also one that is read as a whole and closed."""
    checks = sorted((name, each.nbytes, str(each.check)) for name, each in patch.changes.items())
    return hashlib.sha256(repr((patch.dialect, patch.version, patch.base_version, checks)).encode()).hexdigest()


def _checks(changes: Mapping[str, Sequence[ForeignChange]]) -> tuple[str, ...]:
    """Return the checksums that the result of all changes is held against; none if one of them has no such checksum."""
    last = [each[-1].check for each in changes.values() if each]
    if not all(check and check.of_result for check in last):
        return ()
    return tuple(sorted({check.algorithm for check in last if check}))


def _require_links(patches: Sequence[ForeignPatch]) -> None:
    for number, after in enumerate(patches[1:], 1):
        before = patches[number - 1]
        if None not in (before.version, after.base_version) and before.version != after.base_version:
            what = f"is of version {after.base_version}, and {before.path} makes version {before.version}"
            raise InputError(what, culprit=str(after.path), remedy="give the patches between them too")


def _refuse_other_names(base: Checkpoint, steps: Sequence[Mapping[str, ForeignChange]], files: ModelFiles) -> None:
    """Raise InputError for a change of a tensor that the base stores once, with another name before it."""
    for name in (name for step in steps for name in step if name not in files.specs):
        key = base.shard_of[name].storage(name)
        stored = next(each for each in files.specs if base.shard_of[each].storage(each) == key)
        what = f"is stored once with {stored}, and a patch changes it under this name"
        raise InputError(what, culprit=name, remedy="convert the base to safetensors with `loratool convert` first")


def changed_pieces(base: Checkpoint, name: str, changes: Sequence[ForeignChange]) -> Iterator[memoryview]:
    """Yield the bytes of a tensor after all changes."""
    spec = base.stored[name]
    pieces: Iterator[memoryview] = read_parts(base.shard_of[name], name, 0, spec.nbytes)
    for change in changes:
        pieces = change.verified(pieces, spec)
    return pieces


def check_changes(base: Checkpoint, changes: Mapping[str, Sequence[ForeignChange]], call: Apply) -> None:
    """Read all that changes, and write nothing."""
    changed = {name: each for name, each in changes.items() if each}
    finished = counting((base.stored[name].nbytes for name in changed), call.progress)
    for name, each in changed.items():
        for _ in changed_pieces(base, name, each):
            pass
        finished()


def _write(
    output: Output,
    files: ModelFiles,
    base: Checkpoint,
    changes: Mapping[str, Sequence[ForeignChange]],
    call: Apply,
) -> None:
    output.require_space()
    job, workers = current_job(), call.workers or worker_count()
    opened, joined = partial(open_output, output, {}, belongs), partial(join_output, output)
    with journaled(output.path, {}, output.head(), output.resume, job, opened, joined) as (journal, targets):
        made = [(targets[each.name], file) for each, file in zip(output.files, files.files, strict=True)]
        places = {name: (target, file.begin[name]) for target, file in made for name in file.specs}
        if not job.rank:
            for target, file in made:
                write_frame(target, file)
        names = [name for name, spec in files.specs.items() if spec.nbytes]

        def make(name: str) -> str:
            target, offset = places[name]
            digest = hashlib.sha256()
            for piece in changed_pieces(base, name, changes[name]):
                write_at(target, piece, offset)
                digest.update(piece)
                offset += len(piece)
            return digest.hexdigest()

        for number in [number for number in journal.finished if not _is_there(names, number, places, files, journal)]:
            del journal.finished[number]
        finished = counting((files.specs[name].nbytes for name in names), call.progress)
        tasks = [
            Task(number, (name, 0, files.specs[name].nbytes), partial(make, name)) for number, name in enumerate(names)
        ]
        run_tasks("applied", tasks, job, journal, workers, finished, is_last=True)


def _is_there(
    names: Sequence[str], number: int, places: Mapping[str, tuple[BinaryIO, int]], files: ModelFiles, journal: Journal
) -> bool:
    """Return whether the bytes of a tensor that an earlier run wrote are still in the output."""
    if number >= len(names):
        return False
    (target, begin), nbytes = places[names[number]], files.specs[names[number]].nbytes
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PART, nbytes)))
    for first in range(0, nbytes, PART):
        part = buffer[: nbytes - first]
        read_into(target, part, begin + first)
        digest.update(part)
    return digest.hexdigest() == str(journal.results(number))
