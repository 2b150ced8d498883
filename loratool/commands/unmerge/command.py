"""Run the command `unmerge`: restore the base as it was before a merge, from the merged model and the undo file.

It streams as `merge` does. Each changed tensor is restored from its undo records, which are checked against the hashes
of the bytes that the merge read and wrote. All other tensors are copied under the base's headers. A base that would not
be exact is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

from ...adapters.adapter import Adapter
from ...binding.merge.merge_plan import plan_merge
from ...binding.modules.module_weights import spell_weight
from ...binding.modules.selection import Selection
from ...durable.fileio import sampled
from ...errors import InputError, UsageError
from ...files.checkpoint import Checkpoint, classify_checkpoint, open_checkpoint
from ...files.codecs.codec import Parts
from ...files.containers.safetensors_file import build_header
from ...files.digest import digest_of, has_digest, pieces_of
from ...files.dtypes import TensorSpec
from ...files.folder.side_files import (
    CARD,
    LeftBehind,
    encode_json,
    provenance,
    undo_path,
)
from ...files.output.output import CONTAINERS, Output, OutputFile
from ...files.output.paths import check_output_path, check_undo_files, output_path
from ...files.output.plan import plan_output, put_inside
from ...files.tensor_ref import TensorRef
from ...files.weights_file import paths_of
from ...numerics.merge import ARITHMETIC_VERSION
from ...streaming.apply import restore_codes, restore_tensor, subtract_tensor
from ...streaming.digests import TensorHashes, digest_of_files, hash_pieces
from ...streaming.parallel import choose_device, worker_count
from ...streaming.ranks import current_job
from ...streaming.recode import restore_recoded
from ...streaming.rewrite import ChangedTensor, refuse_overflow, rewrite
from ...streaming.segment import UpdateLoader
from ...undo.checks import prefix_of, spec_of
from ...undo.reader import UndoFile
from ...undo.records import EDITED, NOT_RESTORED, Doubted
from ...undo.writer import read_placements
from ...views.unmerge import UnmergeReport
from ..adapter_requests import AdapterRequest, parse_adapters
from ..arguments import parse_words
from ..cards import described_call, input_word
from ..inputs import open_adapters, refuse_adapter, share_hashes
from ..merged_models import as_in_base, find_undo, match_adapters, replaced_files, require_names, require_written
from .call import Unmerge

WITHOUT_UNDO = "give the undo file with --undo, or use --approximate, which is not exact"


def run_unmerge(call: Unmerge) -> UnmergeReport:
    """Restore the base of a merge."""
    if call.approximate and call.undo is not None:
        raise UsageError("--approximate and --undo exclude each other")
    if call.by is not None:
        raise UsageError("is for changes in place", culprit="--by", remedy="add --in-place, or leave it out")
    requests = parse_adapters(call.adapters, parse_words(call.drop))
    with ExitStack() as opened:
        checkpoint = open_merged(call, call.merged, requests, opened)
        if call.approximate:
            added = open_adapters(requests, call.alpha, opened, base=checkpoint)
            return _subtract(call, checkpoint, requests, added)
        chain = find_undo(checkpoint, call.undo, WITHOUT_UNDO)
        record = UndoFile(chain[0])
        opened.callback(record.close)
        used = match_adapters(record, requests, call.alpha, opened, checkpoint)
        base = base_files(record)
        path, is_file = output_path(call.out, checkpoint, "unmerged")
        if is_file and (len(base) > 1 or checkpoint.parts):
            raise InputError("the base has several files", culprit=str(path), remedy="give a folder with -o")
        inputs = paths_of([*checkpoint.shards, *(a.file for a in used)]) + [record.path]
        exists = check_output_path(path, is_file, inputs, call.force, True, record.side, call.dry_run)
        require_names(checkpoint, record, [file.name for file in base])
        output = plan_restored(checkpoint, record, chain, base, path, is_file)
        output = replace(
            output,
            inputs=(*checkpoint.shards, *(adapter.file for adapter in used)),
            configs=(checkpoint.config, checkpoint.declared, *(adapter.config for adapter in used)),
            call={
                **_described(call, call.merged, requests),
                "undo": f"{record.path.name} ({sampled(record.file)[:16]})",
            },
            resume=call.resume,
        )
        check_undo_files(output, inputs, call.force or call.dry_run)
        with_base_names = as_in_base(checkpoint, record)
        sources, tensors = plan_tensors(
            with_base_names, record, output.specs, used, UpdateLoader(choose_device(call.device))
        )
        if current_job().rank == 0:  # before it writes, for all: the others wait for it in `rewrite`
            _check_the_rest(checkpoint, with_base_names, record, call.workers or worker_count())
        if call.dry_run:
            output.require_own_journal()
        else:
            where, workers = choose_device(call.device), call.workers or worker_count()
            hashes = TensorHashes(
                {name: with_base_names.shard_of[name] for name in record.untouched},
                record.specs.keys() - record.untouched,
            )
            finish = partial(_check_hashes, record, hashes)
            with closing(rewrite(output, sources, tensors, where, workers, call.progress, finish, hashes)) as items:
                for _ in items:
                    pass
        report = report_unmerge(record, os.fspath(call.merged), used, output, call.dry_run)
        digests = {} if call.dry_run else digests_of_unmerge(record, report, used)
        return replace(report, exists=exists, digests=digests)


def open_merged(
    call: Unmerge, path: str | os.PathLike[str], requests: Sequence[AdapterRequest], opened: ExitStack
) -> Checkpoint:
    """Open the merged model; raise InputError for an adapter."""
    checkpoint = open_checkpoint(path)
    opened.callback(checkpoint.close)
    refuse_adapter(checkpoint, call.merged, "the first argument must be the merged model", requests, "unmerge")
    return checkpoint


def _described(call: Unmerge, merged: str | os.PathLike[str], requests: Sequence[AdapterRequest]) -> dict[str, str]:
    adapters = (f"{each.path}:{spell_weight(each.weight, tuple(each.module_weights.items()))}" for each in requests)
    return described_call(call, [input_word(merged), *adapters])


def base_files(undo: UndoFile) -> list[OutputFile]:
    """Return the base's files, with a safetensors file of the same tensors for each torch file."""
    files = []
    for shard, layout in zip(undo.index["shards"], undo.layouts, strict=True):
        name, prefix = shard["name"], prefix_of(shard["name"])
        if layout:
            header, begin, nbytes = layout.head, layout.begin, layout.nbytes
        else:
            specs = {key.removeprefix(prefix): spec_of(spec) for key, spec in shard["specs"].items()}
            header, begin = build_header(specs, list(specs), {"format": "pt"})
            nbytes = len(header) + sum(spec.nbytes for spec in specs.values())
            name = prefix + re.sub("^pytorch_model", "model", Path(name).stem) + ".safetensors"
        files.append(OutputFile(name, header, {prefix + key: start for key, start in begin.items()}, nbytes))
    if len({file.name for file in files}) < len(files):
        raise InputError("it gives two files of the base the same name", culprit=str(undo.path))
    return files


def plan_restored(
    merged: Checkpoint, undo: UndoFile, chain: Sequence[Path], files: Sequence[OutputFile], path: Path, is_file: bool
) -> Output:
    extras = dict(undo.side)
    side_files: dict[str, Path] = {}
    left: list[LeftBehind] = []
    ours = {*extras, *undo.index["new_side"], CARD}  # what the merge wrote
    if not is_file and merged.has_side_files:
        names, rest = classify_checkpoint(merged)
        side_files = {n: merged.folder / n for n in names if n not in ours}
        left = [each for each in rest if merged.folder / each.name not in chain and each.name not in ours]
    shards = zip(undo.index["shards"], undo.layouts, strict=True)
    of_torch = {prefix_of(shard["name"]) for shard, layout in shards if layout is None}
    stale = [name for name in extras if name.endswith(".index.json") and prefix_of(name) in of_torch]
    extras = {name: data for name, data in extras.items() if name not in stale}
    for prefix in of_torch:
        extras |= _new_index([file for file in files if prefix_of(file.name) == prefix], prefix)
    if is_file:
        extras = {}
    if len(files) == 1 and not is_file and undo.index["file"]:
        name = f"model{CONTAINERS[merged.container][0]}"
        files = [OutputFile(name, files[0].header, files[0].begin, files[0].nbytes)]
    former = undo_path(path, is_file)
    carried = {former.with_name(former.name + (f".{i}" if i else "")): o for i, o in enumerate(chain[1:])}
    output = Output(
        path=path,
        is_file=is_file,
        specs=undo.specs,
        files=tuple(files),
        extras=extras,
        side_files=side_files,
        left_behind=tuple(left),
        carried=carried,
    )
    output = put_inside(output, merged)
    left = [each for each in output.left_behind if each.name not in ours]
    return replace(output, left_behind=(*left, *(() if is_file else replaced_files(merged, undo))))


def _new_index(files: Sequence[OutputFile], prefix: str) -> dict[str, bytes]:
    """Return a new index for shards that were torch files, as the base's index names the torch files."""
    if len(files) == 1:
        return {}
    stem = files[0].name.removeprefix(prefix).partition("-")[0]
    size = sum(file.nbytes - len(file.header) for file in files)
    weight_map = {name.removeprefix(prefix): file.name.removeprefix(prefix) for file in files for name in file.begin}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return {f"{prefix}{stem}.safetensors.index.json": encode_json(index)}


def plan_tensors(
    merged: Checkpoint, undo: UndoFile, specs: Mapping[str, TensorSpec], adapters: Sequence[Adapter], load: UpdateLoader
) -> tuple[dict[str, TensorRef], dict[str, ChangedTensor]]:
    """Return the source of each tensor of the base, and the tensors to restore.

    Raises:
        InputError: a tensor has another type or shape than the merge wrote, or was added since.
    """
    sources: dict[str, TensorRef] = {}
    tensors: dict[str, ChangedTensor] = {}
    require_written(merged, undo)
    for name, entry in undo.index["tensors"].items():
        if "recoded" in entry:
            tensors[name] = restore_recoded(_recoded_parts(merged, undo, name), undo, name)
            sources[name] = merged.ref(entry["recoded"]["weight"])
            continue
        weight = undo.weights.get(name)
        if weight or name in specs:
            spec = weight.spec if weight else specs[name]
            placements = read_placements(undo.index, name, spec, adapters)
        if weight:
            sources |= dict.fromkeys(weight.tensors, merged.stored_ref(name))
            tensors |= restore_codes(undo, name, placements, load)
        elif name in specs:
            tensors[name] = restore_tensor(spec, undo, name, placements, load)
    sources |= {name: merged.stored_ref(name) for name in specs if name not in sources}
    return sources, tensors


def _recoded_parts(merged: Checkpoint, undo: UndoFile, name: str) -> Parts:
    """Return the parts of a weight that the merge wrote as codes, as stored in the merged model."""
    recoded = undo.index["tensors"][name]["recoded"]
    weight = merged.weights.get(recoded["weight"])
    fits = weight and (weight.tensors[0], weight.codec.key) == (name, recoded["codec"])
    if not weight or not fits or list(weight.spec.shape) != recoded["shape"]:
        raise InputError(
            f"is not a weight of {recoded['codec']}, which the merge wrote: it was edited since", culprit=name
        )
    return merged.parts_of(recoded["weight"])


def _check_the_rest(merged: Checkpoint, with_base_names: Checkpoint, undo: UndoFile, workers: int) -> None:
    """Raise InputError if tensors were edited of which some bytes are in no undo record."""
    names, tensors = undo.unrecorded(), undo.merged_tensors()
    names = [with_base_names.stored_name(name) for name in names] + [*undo.copies]
    pieces = [(merged.shard_of[name], name, *place) for name in names for place in pieces_of(merged.stored[name])]
    expected = (sha256 for name in names for sha256 in tensors[name][1])
    for (_, name, *_), found, sha256 in zip(pieces, hash_pieces(pieces, workers), expected, strict=True):
        if found != sha256:
            raise InputError(EDITED, culprit=name)


def _check_hashes(undo: UndoFile, hashes: TensorHashes, _: object) -> dict[str, bytes]:
    """Raise InputError unless the base is restored as the merge read it; return no file."""
    for found, fault in ((hashes.of_read, EDITED), (hashes.of_written, NOT_RESTORED)):
        for name, each in found.items():
            if each != undo.base_hashes(name):
                raise InputError(fault, culprit=name)
    return {}


def digests_of_unmerge(undo: UndoFile, report: UnmergeReport, adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return the digests of the merged model, of the adapters and of the base, by the names in the report."""
    merged = undo.merged_tensors()
    files = [member for adapter in adapters for member in adapter.file.members]
    if not has_digest((*merged, *undo.specs, *chain.from_iterable(file.specs for file in files))):
        return {}
    return {
        report.merged: digest_of((name, *each) for name, each in sorted(merged.items())),
        **{adapter.name: digest_of_files(adapter.file.members) for adapter in adapters},
        report.out: digest_of((name, undo.specs[name], undo.base_hashes(name)) for name in sorted(undo.specs)),
    }


def report_unmerge(
    undo: UndoFile, name: str, adapters: Sequence[Adapter], output: Output, dry_run: bool
) -> UnmergeReport:
    changed = {tensor for tensor in undo.index["tensors"] if tensor in output.specs or tensor in undo.weights}
    stored = {
        tensor for name in changed for tensor in (undo.weights[name].tensors if name in undo.weights else (name,))
    }
    return UnmergeReport(
        merged=name,
        out=str(output.path),
        undo=str(undo.path),
        dry_run=dry_run,
        nbytes=output.nbytes,
        adapters=tuple(adapter.name for adapter in adapters),
        restored=len(changed),
        copied=len(output.specs) - len(stored),
        removed=(*(tensor for tensor in undo.index["tensors"] if tensor not in changed), *undo.copies),
        files=tuple(file.name for file in output.files),
        exact_files=None not in undo.layouts,
        not_copied=output.not_copied,
        warnings=output.space_warning() if dry_run else (),
        left_behind=output.left_behind,
    )


def _subtract(
    call: Unmerge, merged: Checkpoint, requests: Sequence[AdapterRequest], added: Sequence[Adapter]
) -> UnmergeReport:
    """Write W' - D, rounded once: wrong only for weights where several values round to the same W'."""
    weighted = share_hashes(zip(added, (each.weight for each in requests), strict=True))
    adapters = [adapter for adapter, _ in weighted]
    plan = plan_merge(merged, weighted, Selection(), "share")
    for name in sorted(plan.changed):
        if name in plan.added or any(not p.update.additive or p.update.base for p in plan.requested.get(name, ())):
            raise InputError("has a non-additive update, which cannot be subtracted", culprit=name)
        if name in merged.weights:
            raise InputError(f"is {merged.weights[name].codec.key}, which a merge never writes", culprit=name)
    path, is_file = output_path(call.out, merged, "unmerged")
    inputs = paths_of([*merged.shards, *(a.file for a in adapters)])
    exists = check_output_path(path, is_file, inputs, call.force, is_model=True, dry_run=call.dry_run)
    facts = {"adapters": sorted(a.sha256 for a in adapters), "approximate": True, "arithmetic": ARITHMETIC_VERSION}
    origin = provenance("unmerge", facts, merged.metadata.get("loratool"))
    output = plan_output(merged, path, is_file, origin, plan.changed, container=merged.container)
    output = replace(
        output,
        inputs=(*merged.shards, *(adapter.file for adapter in adapters)),
        configs=(*output.configs, *(adapter.config for adapter in adapters)),
        call=_described(call, merged.path, requests),
        resume=call.resume,
    )
    check_undo_files(output, inputs, call.force or call.dry_run)
    device = choose_device(call.device)
    load = UpdateLoader(device)
    uncertain: list[Doubted] = []
    if call.dry_run:
        output.require_own_journal()
    else:
        tensors = {n: subtract_tensor(plan.sources[n], p, load) for n, p in plan.placements.items()}
        sources = plan.stored_sources(output.specs)
        runs = rewrite(output, sources, tensors, device, call.workers or worker_count(), call.progress)
        with closing(runs) as items:
            for item, blocks in items:
                refuse_overflow(item.tensor, [block.change for block in blocks], plan.sources, output)
                uncertain += blocks
    return UnmergeReport(
        merged=str(merged.path),
        out=str(path),
        undo="",
        dry_run=call.dry_run,
        nbytes=output.nbytes,
        adapters=tuple(adapter.name for adapter in adapters),
        restored=len(plan.placements),
        copied=len(output.specs) - len(plan.placements),
        removed=(),
        files=tuple(file.name for file in output.files),
        exact_files=False,
        not_copied=output.not_copied,
        approximate=True,
        doubtful=sum(block.doubtful for block in uncertain),
        farthest=max((block.farthest for block in uncertain), default=0),
        warnings=(*plan.warnings, *(output.space_warning() if call.dry_run else ())),
        left_behind=output.left_behind,
        exists=exists,
    )
