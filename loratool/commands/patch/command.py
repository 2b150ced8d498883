"""Write a patch: read two models span by span, and code the second's numbers against the first's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ...durable.journal import Journal
from ...durable.partial import partial_file, partial_path
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.digest import tensors_of
from ...files.dtypes import DTYPES
from ...files.folder.side_files import UNKNOWN, LeftBehind
from ...files.output.output import naming_output
from ...files.output.paths import check_output_path
from ...files.weights_file import described_inputs, paths_of, require_unchanged
from ...patches.model_files import ModelFiles
from ...patches.patch_file import (
    CodedSpan,
    PatchContent,
    SideFile,
    coded_type,
    is_side_file,
    may_bring,
    require_room,
    size_of,
    write_patch,
)
from ...patches.side import read_side_file, side_names
from ...patches.sources import ModelSource
from ...patches.spans import digest_of_spans
from ...streaming.journaled import journaled
from ...streaming.parallel import map_in_order, worker_count
from ...streaming.ranks import Job, current_job
from ...views.foreign_patch import ForeignPatchReport
from ...views.patch import BodySize, PatchReport, PatchRow
from ..adapter_requests import parse_adapters
from ..arguments import parse_paths
from ..cards import described_call, input_word
from ..predictions import adapter_paths, attached, merged_source
from .call import Patch
from .coding import Sides, SpecComparison, base_digest, code_spans, compare_specs, estimated
from .target import PatchTarget, open_target

CODE = "code or a pickle that is not the base's, which a patch does not bring"

LOST = "code or a pickle of the base alone, which apply --reverse does not bring back"

RESULTS = {CodedSpan.__name__: CodedSpan}


def run_patch(call: Patch) -> PatchReport | ForeignPatchReport:
    """Write the difference of two models."""
    path, workers = Path(call.out or "loratool.patch"), call.workers or worker_count()
    with ExitStack() as opened:
        base = opened.enter_context(closing(open_checkpoint(call.base)))
        target = open_target(call, base, opened)
        if call.to is not None:
            from .foreign import write_foreign

            return write_foreign(call, base, target)
        for name in ("step", "encoding", "checksum"):
            if getattr(call, name) is not None:
                raise UsageError("is for patches of other programs", culprit=f"--{name}", remedy="add --to DIALECT")
        requests = parse_adapters(call.adapter) if call.adapter else []
        source: Any = merged_source(base, requests, opened) if requests else ModelSource(base)
        inputs = [*paths_of(base.shards), *target.paths, *adapter_paths(requests)]
        exists = check_output_path(path, True, inputs, call.force, dry_run=call.dry_run)
        counted, sources = [*tensors_of(base.shards)], (ModelSource(base), target.source)
        compared = compare_specs(base.stored, counted, target.files, sources, workers)
        side, base_side, lost = compare_side_files(base, target)
        kept_back = [
            LeftBehind(each, len(target.side[each]), CODE if is_side_file(each) else UNKNOWN)
            for each in target.side.keys() - side.keys()
        ]
        target = replace(target, left=(*target.left, *kept_back))
        report = partial(
            _report, os.fspath(call.base), target, str(path), compared, adapters=tuple(each.path for each in requests)
        )
        spans = compared.spans()
        files = _base_files(base) if compared.has_same_tensors and not (call.one_way or requests) else None
        require_room((target.files, files), (side, base_side), len(spans), target.name)
        if call.dry_run:
            sides = Sides(source, target.source, compared.renamed, call.fast, keep_back=False)
            with closing(map_in_order(partial(estimated, sides=sides), spans, workers)) as estimates:
                sizes = list(estimates)
            return report(sizes, nbytes=sum(size for _, size, _ in sizes), dry_run=True, exists=exists)
        words = map(input_word, (call.base, *parse_paths(call.tuned)))
        head: dict[str, dict[str, Any]] = {
            "options": described_call(call, [*words]),
            "inputs": described_inputs(
                (*base.shards, *target.opened), [base.config, target.digest], adapter_paths(requests)
            ),
        }
        with _opened(path, head, call.resume) as (job, journal, place):
            sides = Sides(source, target.source, compared.renamed, call.fast, keep_back=files is not None)
            coded = code_spans(spans, sides, job, journal, workers, call.progress)
            content = PatchContent(
                base=files,
                target=target.files,
                base_digest=base_digest(
                    base, [span.named(compared.renamed) for span in spans], coded if not requests else (), workers
                ),
                digest=digest_of_spans(compared.specs, spans, [each.hashes for each in coded]),
                cast=compared.cast,
                renamed=compared.renamed,
                new=compared.new,
                removed=len(compared.removed),
                side=side,
                base_side=base_side,
                adapters=attached(requests),
            )
            if target.digest not in (None, content.digest):
                raise InputError("makes another model than it names", culprit=str(target.paths[-1]))
            assert place is not None
            nbytes, reversible = write_patch(place, content, coded)
            require_unchanged((*base.shards, *target.opened, *(source.adapter_files if requests else ())))
        sizes = [
            (each.body, size_of(each.data) + (size_of(each.back) if reversible else 0), each.changed) for each in coded
        ]
        digests = {os.fspath(call.base): content.base_digest, target.name: content.digest}
        warnings = tuple(f"{name}: {LOST}" for name in lost if reversible)
        return report(sizes, nbytes=nbytes, reversible=reversible, digests=digests, warnings=warnings)


@contextmanager
def _opened(
    path: Path, head: Mapping[str, Mapping[str, Any]], resume: bool
) -> Iterator[tuple[Job, Journal, BinaryIO | None]]:
    """Open the output and its journal. The output is None on ranks other than 0."""

    def open_place(goes_on: Callable[[], bool]) -> Any:
        return partial_file(path, left=lambda: [partial_path(path)] if goes_on() else [])

    job = current_job()
    with naming_output(path), journaled(path, RESULTS, head, resume, job, open_place, nullcontext) as (journal, place):
        yield job, journal, place


def _base_files(base: Checkpoint) -> ModelFiles | None:
    """Return the base's files, from which the way back makes them again; None if a patch cannot."""
    try:
        return ModelFiles.of(base)
    except InputError:
        return None


def compare_side_files(
    base: Checkpoint, target: PatchTarget
) -> tuple[dict[str, SideFile], dict[str, SideFile], list[str]]:
    """Return side files: the target's, and those of the base that the target has not, or not so; then what is lost.

    Content that the base has too is left out, and so is what a patch may not bring: of the base, that is lost.
    """
    others = {name: read_side_file(base, name) for name in side_names(base)}
    side = {
        name: SideFile.of(data, known=others.get(name) == data)
        for name, data in target.side.items()
        if may_bring(name) or (others.get(name) == data and is_side_file(name))
    }
    rest = {name: data for name, data in others.items() if target.side.get(name) != data}
    brought = {name: SideFile.of(data, known=False) for name, data in rest.items() if may_bring(name)}
    return side, brought, sorted(rest.keys() - brought.keys())


def _report(
    base: str,
    target: PatchTarget,
    out: str,
    compared: SpecComparison,
    sizes: Sequence[tuple[str, int, tuple[int, ...]]],
    nbytes: int,
    dry_run: bool = False,
    reversible: bool | None = None,
    **more: Any,
) -> PatchReport:
    """Return the report.

    Args:
        sizes: of each span its body, the bytes of it, and how many numbers of each piece change.
    """
    changed, of_tensor, bodies = dict[str, int](), dict[str, float](), dict[str, list[int]]()
    for span, (body, size, counts) in zip(compared.spans(), sizes, strict=True):
        total = bodies.setdefault(body, [0, 0, 0])
        total[0], total[1], total[2] = total[0] + 1, total[1] + span.nbytes, total[2] + size
        weight = sum(counts) or 1
        for piece, count in zip(span.pieces, counts, strict=True):
            changed[piece.tensor] = changed.get(piece.tensor, 0) + count
            of_tensor[piece.tensor] = of_tensor.get(piece.tensor, 0.0) + size * count / weight
    rows = tuple(
        PatchRow(
            name=name,
            dtype=spec.dtype,
            was=compared.cast.get(name, "" if name in compared.new else spec.dtype),
            nbytes=spec.nbytes,
            changed=changed[name],
            numbers=max(1, spec.nbytes * 8 // DTYPES[coded_type(spec.dtype)]),
            patch_nbytes=round(of_tensor[name]),
        )
        for name, spec in compared.specs.items()
        if changed.get(name)
    )
    return PatchReport(
        base=base,
        tuned=target.name,
        out=out,
        dry_run=dry_run,
        nbytes=nbytes,
        model_nbytes=sum(spec.nbytes for spec in compared.specs.values()),
        tensors=rows,
        unchanged=sum(not changed.get(name) for name in compared.specs),
        bodies={key: BodySize(*total) for key, total in sorted(bodies.items())},
        renamed=compared.renamed,
        new=compared.new,
        removed=compared.removed,
        reversible=reversible,
        files=tuple(file.name for file in target.files.files),
        left_behind=target.left,
        **more,
    )
