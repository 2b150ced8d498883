"""Apply patches: make each span of the last model of a chain in memory, and write it once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from ...durable.fileio import read_into, write_at
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.output.output import CONTAINERS, Output, OutputFile, join_output, open_output
from ...files.output.paths import check_output_name, check_output_path
from ...files.weights_file import paths_of
from ...patches.model_files import ModelFiles
from ...patches.patch_file import PatchFile, SideFile
from ...patches.side import read_side_file, side_names
from ...patches.sources import ModelSource, PatchedSource, TensorSource, piece_hashes
from ...patches.spans import TensorSpan, digest_of_spans
from ...streaming.journaled import Task, journaled, run_tasks
from ...streaming.parallel import map_in_order, worker_count
from ...streaming.ranks import current_job
from ...undo.reader import belongs
from ...views.apply import ApplyReport
from ..arguments import parse_paths
from ..cards import described_call, input_word
from .call import Apply


def run_apply(call: Apply) -> ApplyReport:
    """Make a model of another by patches."""
    workers = call.workers or worker_count()
    with ExitStack() as opened:
        base = open_checkpoint(call.base)
        opened.callback(base.close)
        names = parse_paths(call.patches)
        patches = [PatchFile(Path(each)) for each in names]
        for patch in patches:
            opened.callback(patch.close)
        _require_chain(patches)
        steps = list(reversed(patches)) if call.reverse else patches
        model: TensorSource = ModelSource(base)
        side = {name: partial(read_side_file, base, name) for name in side_names(base)}
        for patch in steps:
            model = PatchedSource(model, os.fspath(call.base), patch, call.reverse)
            side = _side_after(side, patch, call.reverse, os.fspath(call.base))
        assert isinstance(model, PatchedSource)
        files, digest = model.files, (patches[0].base_digest if call.reverse else patches[-1].digest)
        path, is_file = _output_path(call, files)
        inputs = paths_of(base.shards) + [patch.path for patch in patches]
        contents = {name: read() for name, read in side.items()}
        exists = check_output_path(path, is_file, inputs, call.force, True, contents, call.dry_run)
        output = _output(path, files, contents, base, call, patches)
        report = ApplyReport(
            base=os.fspath(call.base),
            patches=names,
            out=str(path),
            dry_run=call.dry_run,
            nbytes=output.nbytes,
            tensors=len(files.specs),
            spans=len(steps[-1].spans),
            reverse=call.reverse,
            files=tuple(file.name for file in files.files),
            exists=exists,
        )
        spans = steps[-1].spans
        if call.dry_run:
            output.require_own_journal()
            check = partial(_checked, model, spans)
            with closing(map_in_order(check, range(len(spans)), workers)) as results:
                hashes, done = [], 0
                for number, found in enumerate(results):
                    hashes.append(found)
                    done += spans[number].nbytes
                    if call.progress:
                        call.progress(done, output.nbytes)
        else:
            hashes = _write(output, files, model, spans, call, workers, digest, steps[-1].path)
        _require_digest(files, spans, hashes, digest, steps[-1].path)
        ends = {os.fspath(call.base): steps[0].digest if call.reverse else steps[0].base_digest}
        return replace(report, digests={**ends, str(path): digest} if not call.dry_run else {})


def _require_chain(patches: Sequence[PatchFile]) -> None:
    """Raise InputError unless each patch begins where the one before ends."""
    for before, after in pairwise(patches):
        if before.digest != after.base_digest:
            made_here = next((each for each in patches if each.digest == after.base_digest), None)
            remedy = f"give it after {made_here.path}" if made_here else "give the patches between them too"
            what = f"does not begin where {before.path} ends: it is of the model {after.base_digest[:16]}..., not "
            raise InputError(f"{what}{before.digest[:16]}...", culprit=str(after.path), remedy=remedy)


def _side_after(side: Mapping[str, Any], patch: PatchFile, back: bool, base: str) -> dict[str, Any]:
    """Return how to read the side files of the model that a patch makes."""

    def known(name: str, entry: SideFile) -> bytes:
        data: bytes | None = side[name]() if name in side else None
        if data is None or SideFile.of(data, known=True).sha256 != entry.sha256:
            is_now = "another file" if data is not None else "missing"
            what = f"is needed as it was when {patch.path} was made, and is {is_now}"
            raise InputError(what, culprit=os.path.join(base, name), remedy="give the whole base of the patch")
        return data

    if back:
        kept = {name: entry for name, entry in patch.side.items() if entry.content is None}
        wanted = {**kept, **patch.base_side}
    else:
        wanted = patch.side
    return {
        name: partial(known, name, entry) if entry.content is None else partial(bytes, entry.content)
        for name, entry in wanted.items()
    }


def _output_path(call: Apply, files: ModelFiles) -> tuple[Path, bool]:
    container = _container(files)
    ending = Path(files.files[0].name).suffix
    if call.out is None:
        return Path(f"patched{ending}" if files.is_file else "patched"), files.is_file
    path, is_file = check_output_name(call.out, container)
    if is_file is not files.is_file:
        what = "is a file, and the model that is made is a folder" if is_file else "is a folder, and the model a file"
        remedy = "name a folder with -o" if is_file else f"name a file that ends in {ending} with -o"
        raise UsageError(what, culprit=str(path), remedy=remedy)
    return path, is_file


def _container(files: ModelFiles) -> str:
    """Return the container of a model's files, a key of CONTAINERS."""
    ending = Path(files.files[0].name).suffix
    return next((key for key, endings in CONTAINERS.items() if ending in endings), "safetensors")


def _output(
    path: Path,
    files: ModelFiles,
    contents: Mapping[str, bytes],
    base: Checkpoint,
    call: Apply,
    patches: Sequence[PatchFile],
) -> Output:
    made = tuple(
        OutputFile(path.name if files.is_file else file.name, file.frame[: file.head], file.begin, file.nbytes)
        for file in files.files
    )
    described = described_call(call, [input_word(call.base), *map(input_word, parse_paths(call.patches))])
    return Output(
        path=path,
        is_file=files.is_file,
        specs=files.specs,
        files=made,
        extras=contents,
        side_files={},
        left_behind=(),
        inputs=base.shards,
        configs=(base.config,),
        call={**described, **{f"patch {n}": each.digest for n, each in enumerate(patches, 1)}},
        resume=call.resume,
    )


def _checked(model: PatchedSource, spans: Sequence[TensorSpan], number: int) -> tuple[str, ...]:
    return tuple(model.made(number)[1])


def _write(
    output: Output,
    files: ModelFiles,
    model: PatchedSource,
    spans: Sequence[TensorSpan],
    call: Apply,
    workers: int,
    digest: str,
    culprit: Path,
) -> list[tuple[str, ...]]:
    """Write the output, and return the hashes of the pieces of each span."""
    output.require_space()
    job = current_job()
    opened = partial(open_output, output, {}, belongs)
    with journaled(output.path, {}, output.head(), output.resume, job, opened, partial(join_output, output)) as (
        journal,
        targets,
    ):
        places = {
            name: (targets[made.name], file.begin[name])
            for made, file in zip(output.files, files.files, strict=True)
            for name in file.specs
        }
        if not job.rank:
            for made, file in zip(output.files, files.files, strict=True):
                _write_frame(targets[made.name], file)

        def write(number: int) -> tuple[str, ...]:
            data, hashes = model.made(number)
            done = 0
            for tensor, first, length in spans[number].pieces:
                target, begin = places[tensor]
                write_at(target, data[done : done + length], begin + first)
                done += length
            return tuple(hashes)

        tasks = [
            Task(number, (span.pieces[0].tensor, span.pieces[0].first, span.nbytes), partial(write, number))
            for number, span in enumerate(spans)
        ]
        for number in [number for number in journal.finished if not _is_there(journal, number, spans, places)]:
            del journal.finished[number]
        sizes, done = iter([span.nbytes for span in spans]), 0

        def finished() -> None:
            nonlocal done
            done += next(sizes, 0)
            if call.progress:
                call.progress(done, output.nbytes)

        hashes = run_tasks("applied", tasks, job, journal, workers, finished, is_last=True)
        _require_digest(files, spans, hashes, digest, culprit)
        return hashes


def _write_frame(target: BinaryIO, file: Any) -> None:
    done = 0
    for first, length in file.gaps():
        write_at(target, memoryview(file.frame)[done : done + length], first)
        done += length


def _is_there(
    journal: Any, number: int, spans: Sequence[TensorSpan], places: Mapping[str, tuple[BinaryIO, int]]
) -> bool:
    """Return whether the bytes of a span that an earlier run wrote are still in the output."""
    if number >= len(spans):
        return False
    span, data = spans[number], bytearray(spans[number].nbytes)
    done = 0
    for tensor, first, length in span.pieces:
        target, begin = places[tensor]
        read_into(target, memoryview(data)[done : done + length], begin + first)
        done += length
    return tuple(piece_hashes(span, memoryview(data))) == tuple(journal.results(number))


def _require_digest(
    files: ModelFiles, spans: Sequence[TensorSpan], hashes: Sequence[Sequence[str]], digest: str, culprit: Path
) -> None:
    """Raise InputError if a model is not the one that its patch names."""
    if digest_of_spans(files.specs, spans, hashes) != digest:
        raise InputError("makes another model than it names", culprit=str(culprit), remedy="make it again")
