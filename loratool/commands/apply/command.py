"""Apply patches: make each span of the last model of a chain in memory, and write it once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ...durable.fileio import read_into, write_at
from ...errors import InputError, UsageError
from ...files.checkpoint import open_checkpoint
from ...files.containers.torch_reader import TorchFile
from ...files.folder.side_files import is_patch
from ...files.hub.cache import place_named
from ...files.output.output import Output, join_output, open_output
from ...files.output.paths import check_output_path
from ...files.weights_file import paths_of
from ...patches.chain import PatchChain
from ...patches.dialects.table import find_dialect
from ...patches.model_files import ModelFile
from ...patches.patch_file import PATCH
from ...patches.sources import piece_hashes, split_span
from ...patches.spans import TensorSpan, digest_of_spans
from ...streaming.journaled import Task, journaled, run_tasks
from ...streaming.parallel import Progress, counting, map_in_order, worker_count
from ...streaming.ranks import current_job
from ...undo.reader import belongs
from ...views.apply import ApplyReport
from ..arguments import parse_paths
from ..predictions import opened_chain
from .call import Apply
from .output import changed_tensors, choose_output_path, describe_output, write_frame


def run_apply(call: Apply) -> ApplyReport:
    """Make a model of another by patches."""
    names, workers = parse_paths(call.patches), call.workers or worker_count()
    if call.by is not None:
        raise UsageError("is for changes in place", culprit="--by", remedy="add --in-place, or leave it out")
    places = [*map(place_named, names)]
    ours = [*map(is_patch, places)]
    if not any(ours) and (call.step is not None or all(map(find_dialect, places))):
        from .foreign import apply_foreign

        return apply_foreign(call)
    if call.step is not None or call.allow:
        option = "--allow" if call.step is None else "--step"
        raise UsageError("is for patches of other programs", culprit=option, remedy=f"leave out {option}")
    with ExitStack() as opened:
        base = opened.enter_context(closing(open_checkpoint(call.base)))
        chain = opened.enter_context(opened_chain(base, os.fspath(call.base), names, call.reverse))
        path, is_file = choose_output_path(call, chain.files)
        inputs, side = paths_of(base.shards) + [patch.path for patch in chain.patches], chain.side()
        exists = check_output_path(path, is_file, inputs, call.force, True, side, call.dry_run)
        chosen = {f"patch {number}": each.digest for number, each in enumerate(chain.patches, 1)}
        output = describe_output(path, chain.files, side, base.shards, call, chosen)
        if call.dry_run:
            output.require_own_journal()
            check_chain(chain, workers, call.progress)
        else:
            _write(output, chain, workers, call.progress)
        given = chain.given_digest()
        digests = {os.fspath(call.base): given} if given else {}
        return ApplyReport(
            base=os.fspath(call.base),
            patches=names,
            out=str(path),
            dry_run=call.dry_run,
            nbytes=output.nbytes,
            tensors=len(chain.files.specs),
            spans=len(chain.source.spans),
            reverse=call.reverse,
            files=tuple(file.name for file in chain.files.files),
            done=chain.is_done(),
            checked=("sha256",),
            changed=changed_tensors(chain.files, [patch.tensor_sizes() for patch in chain.patches]),
            exists=exists,
            digests=digests if call.dry_run else {**digests, str(path): chain.digest},
        )


def check_chain(chain: PatchChain, workers: int, progress: Progress | None) -> None:
    """Make all spans, and write nothing."""
    spans, hashes = chain.source.spans, []
    finished = counting((span.nbytes for span in spans), progress)
    with closing(map_in_order(chain.source.made, range(len(spans)), workers)) as results:
        for _, found in results:
            hashes.append(found)
            finished()
    _require_digest(chain, hashes)


def _write(output: Output, chain: PatchChain, workers: int, progress: Progress | None) -> None:
    output.require_space()
    job, spans = current_job(), chain.source.spans
    opened, joined = partial(open_output, output, {}, belongs), partial(join_output, output)
    with journaled(output.path, {}, output.head(), output.resume, job, opened, joined) as (journal, targets):
        files = [(targets[made.name], file) for made, file in zip(output.files, chain.files.files, strict=True)]
        places = {name: (target, file.begin[name]) for target, file in files for name in file.specs}
        if not job.rank:
            for target, file in files:
                write_frame(target, file)

        def make(number: int) -> tuple[str, ...]:
            data, hashes = chain.source.made(number)
            for part, piece in zip(split_span(spans[number], data), spans[number].pieces, strict=True):
                target, begin = places[piece.tensor]
                write_at(target, part, begin + piece.first)
            return tuple(hashes)

        def is_there(number: int) -> bool:
            """Return whether the bytes of a span that an earlier run wrote are still in the output."""
            if number >= len(spans):
                return False
            data = read_places(spans[number], places)
            return piece_hashes(spans[number], data) == list(journal.results(number))

        for number in [number for number in journal.finished if not is_there(number)]:
            del journal.finished[number]
        finished = counting((span.nbytes for span in spans), progress)
        tasks = [Task(number, span.place, partial(make, number)) for number, span in enumerate(spans)]
        _require_digest(chain, run_tasks("applied", tasks, job, journal, workers, finished, is_last=True))
        for target, file in files:
            if file.container == "torch":
                _require_plain(Path(target.name), file, chain.last.path)


def _require_plain(path: Path, file: ModelFile, culprit: Path) -> None:
    """Raise InputError for a torch file whose pickle does more than describe the tensors: its bytes are the patch's."""
    try:
        with closing(TorchFile(path)) as made:
            made.put_under(file.name[: file.name.rfind("/") + 1])
            specs, begin = made.specs, made.begin
    except InputError as error:
        what = f"makes a torch file that is not of plain weights: {error.message}"
        raise InputError(what, culprit=str(culprit), remedy="do not load what this patch makes") from error
    if (specs, begin) != (file.specs, file.begin):
        raise InputError("makes a torch file of other tensors than it says", culprit=str(culprit), remedy=PATCH.remedy)


def read_places(span: TensorSpan, places: Mapping[str, tuple[BinaryIO, int]]) -> memoryview:
    """Read a span of tensors at known places: a tensor -> its file and its first byte there."""
    data = memoryview(bytearray(span.nbytes))
    for part, piece in zip(split_span(span, data), span.pieces, strict=True):
        target, begin = places[piece.tensor]
        read_into(target, part, begin + piece.first)
    return data


def _require_digest(chain: PatchChain, hashes: Sequence[Sequence[str]]) -> None:
    """Raise InputError if a model is not the one that its patch names."""
    if digest_of_spans(chain.files.specs, chain.source.spans, hashes) != chain.digest:
        raise InputError("makes another model than it names", culprit=str(chain.last.path), remedy="make it again")
