"""Write a patch: read two models span by span, and code the second's numbers against the first's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from ...durable.journal import Journal
from ...durable.partial import partial_file, partial_path
from ...errors import InputError
from ...files.checkpoint import Checkpoint, classify_checkpoint, open_checkpoint
from ...files.digest import tensors_of
from ...files.folder.side_files import LeftBehind
from ...files.output.paths import check_output_path
from ...files.weights_file import described_inputs, paths_of, require_unchanged
from ...patches.model_files import ModelFiles
from ...patches.patch_file import CodedSpan, PatchContent, SideFile, may_bring, write_patch
from ...patches.side import read_side_file, side_names
from ...patches.sources import ModelSource
from ...patches.spans import TensorSpan, digest_of_spans
from ...streaming.journaled import journaled
from ...streaming.parallel import worker_count
from ...streaming.ranks import Job, current_job
from ...views.patch import BodySize, PatchReport, PatchRow
from ..cards import described_call, input_word
from .call import Patch
from .coding import Sides, SpecComparison, base_digest, code_spans, compare_specs, estimated

RESULTS = {CodedSpan.__name__: CodedSpan}


def run_patch(call: Patch) -> PatchReport:
    """Write the difference of two models."""
    path, workers = Path(call.out or "loratool.patch"), call.workers or worker_count()
    with closing(open_checkpoint(call.base)) as base, closing(open_checkpoint(call.tuned)) as tuned:
        shards = (*base.shards, *tuned.shards)
        exists = check_output_path(path, True, paths_of(shards), call.force, dry_run=call.dry_run)
        target = ModelFiles.of(tuned)
        compared = compare_specs(base.stored, [*tensors_of(base.shards)], target)
        spans = compared.spans()
        side, base_side, left = compare_side_files(base, tuned)
        names = os.fspath(call.base), os.fspath(call.tuned), str(path)
        if call.dry_run:
            sides = Sides(ModelSource(base), ModelSource(tuned), call.fast, keep_back=False)
            sizes = [estimated(span, sides) for span in spans]
            report = _report(names, compared, spans, sizes, target, left)
            nbytes = sum(size for _, size, _ in sizes)
            return _complete(report, nbytes, dry_run=True, exists=exists)
        files = _base_files(base) if compared.has_same_tensors and not call.one_way else None
        head: dict[str, dict[str, Any]] = {
            "options": described_call(call, [input_word(call.base), input_word(call.tuned)]),
            "inputs": described_inputs(shards, [base.config, tuned.config]),
        }
        with _opened(path, head, call.resume) as (job, journal, place):
            sides = Sides(ModelSource(base), ModelSource(tuned), call.fast, keep_back=files is not None)
            coded = code_spans(spans, sides, job, journal, workers, call.progress)
            require_unchanged(shards)
            content = PatchContent(
                base=files,
                target=target,
                base_digest=base_digest(base, spans, coded, workers),
                digest=digest_of_spans(compared.specs, spans, [each.hashes for each in coded]),
                cast=compared.cast,
                new=compared.new,
                removed=len(compared.removed),
                side=side,
                base_side=base_side,
            )
            assert place is not None
            nbytes, reversible = write_patch(place, content, coded)
        sizes = [(each.body, _length(each.data), each.changed) for each in coded]
        report = _report(names, compared, spans, sizes, target, left)
        digests = {names[0]: content.base_digest, names[1]: content.digest}
        return _complete(report, nbytes, reversible=reversible, digests=digests)


def _length(data: Any) -> int:
    return data if isinstance(data, int) else getattr(data, "nbytes", len(data) if isinstance(data, bytes) else 0)


@contextmanager
def _opened(
    path: Path, head: Mapping[str, Mapping[str, Any]], resume: bool
) -> Iterator[tuple[Job, Journal, BinaryIO | None]]:
    """Open the output and its journal. The output is None on ranks other than 0."""

    def open_place(goes_on: Callable[[], bool]) -> Any:
        return partial_file(path, left=lambda: [partial_path(path)] if goes_on() else [])

    job = current_job()
    with journaled(path, RESULTS, head, resume, job, open_place, nullcontext) as (journal, place):
        yield job, journal, place


def _base_files(base: Checkpoint) -> ModelFiles | None:
    """Return the base's files, from which the way back makes them again; None if a patch cannot."""
    try:
        return ModelFiles.of(base)
    except InputError:
        return None


def compare_side_files(
    base: Checkpoint, tuned: Checkpoint
) -> tuple[dict[str, SideFile], dict[str, SideFile], list[LeftBehind]]:
    """Return the target's side files, those of the base that the target has not or not so, and what stays behind.

    Content that the base has too is left out.
    """
    if tuned.given_as_file:
        return {}, {}, []
    left = [each for each in classify_checkpoint(tuned)[1] if each.name not in side_names(tuned)]
    sides = [{name: read_side_file(each, name) for name in side_names(each)} for each in (tuned, base)]
    wanted = {name: data for name, data in sides[0].items() if may_bring(name) or sides[1].get(name) == data}
    left += [LeftBehind(name, len(sides[0][name]), CODE_DIFFERS) for name in sides[0].keys() - wanted.keys()]
    side = {name: _side_file(data, sides[1].get(name)) for name, data in wanted.items()}
    others = {name: data for name, data in sides[1].items() if wanted.get(name) != data and may_bring(name)}
    return side, {name: _side_file(data, None) for name, data in others.items()}, left


CODE_DIFFERS = "code or a pickle, which a patch does not bring"


def _side_file(data: bytes, other: bytes | None) -> SideFile:
    return SideFile.of(data, known=data == other)


def _report(
    names: tuple[str, str, str],
    compared: SpecComparison,
    spans: Sequence[TensorSpan],
    sizes: Sequence[tuple[str, int, tuple[int, ...]]],
    target: ModelFiles,
    left: Sequence[LeftBehind],
) -> dict[str, Any]:
    """Return the fields of the report that follow from the spans."""
    changed, nbytes, bodies = dict[str, int](), dict[str, float](), dict[str, list[int]]()
    for span, (body, size, counts) in zip(spans, sizes, strict=True):
        total = bodies.setdefault(body, [0, 0, 0])
        total[0], total[1], total[2] = total[0] + 1, total[1] + span.nbytes, total[2] + size
        weight = sum(counts) or 1
        for piece, count in zip(span.pieces, counts, strict=True):
            changed[piece.tensor] = changed.get(piece.tensor, 0) + count
            nbytes[piece.tensor] = nbytes.get(piece.tensor, 0.0) + size * count / weight
    rows = tuple(
        PatchRow(
            name=name,
            dtype=spec.dtype,
            was=compared.cast.get(name, "" if name in compared.new else spec.dtype),
            nbytes=spec.nbytes,
            changed=changed[name],
            numbers=max(1, spec.size),
            patch_nbytes=round(nbytes[name]),
        )
        for name, spec in compared.specs.items()
        if changed.get(name)
    )
    return {
        "base": names[0],
        "tuned": names[1],
        "out": names[2],
        "model_nbytes": sum(spec.nbytes for spec in compared.specs.values()),
        "tensors": rows,
        "unchanged": sum(not changed.get(name) for name in compared.specs),
        "bodies": {key: BodySize(*total) for key, total in sorted(bodies.items())},
        "new": compared.new,
        "removed": compared.removed,
        "left_behind": tuple(left),
        "files": tuple(file.name for file in target.files),
    }


def _complete(fields: Mapping[str, Any], nbytes: int, **more: Any) -> PatchReport:
    return PatchReport(**fields, nbytes=nbytes, **{"dry_run": False, "reversible": None, **more})
