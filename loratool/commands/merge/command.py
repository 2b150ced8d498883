"""Run the command `merge`: write W' = RN(W + sum of weight * delta), streamed from files to files.

It plans from headers, and does all checks before the first byte is written. Then the kernel copies untouched ranges,
and adapted matrices are streamed by blocks of rows, so that memory does not depend on the model's size. The bytes of
the result depend only on the inputs (`numerics.decide`).
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, cast

from ...adapters.adapter import UNREAD, Adapter
from ...adapters.formats import usual_format
from ...adapters.updates.replace import ReplaceTensor
from ...architectures.mlx_names import FORMAT
from ...binding.merge.classifier_heads import ClassChoice
from ...binding.merge.coded_bases import note_of_a_file, plan_codes, require_undoable
from ...binding.merge.likeness import plan_like
from ...binding.merge.merge_plan import MergePlan, plan_merge
from ...binding.merge.repeated_layers import require_all_layers
from ...binding.merge.tokenizer import choose_tokenizer
from ...binding.merge.trained_modules import take_trained_modules
from ...binding.modules.module_weights import spell_weight
from ...binding.modules.selection import Selection
from ...durable.fileio import free_bytes
from ...durable.in_place import ModelInPlace
from ...durable.journal import StoredBytes
from ...errors import NeedsFlag, UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.codecs.codec import Quantizer
from ...files.containers.gguf_file import GgufFile
from ...files.containers.indexed_file import is_place, packer
from ...files.digest import digest_of, has_digest, tensors_of
from ...files.dtypes import MERGE_DTYPES, TensorSpec
from ...files.folder.sentence_transformers import MODULES
from ...files.folder.side_files import CARD, has_card, provenance
from ...files.output.model_card import ModelCard, code, name_on_hub, read_licence, shown_name
from ...files.output.output import Output, naming_output
from ...files.output.paths import check_output_path, check_undo_files, output_path
from ...files.output.plan import plan_output
from ...files.tensor_ref import TensorRef, known_finite, require_finite
from ...files.weights_file import WeightsFile, paths_of
from ...numerics.forms import FORMS
from ...numerics.merge import ARITHMETIC_VERSION
from ...numerics.rounding_stats import RoundingStats
from ...streaming.apply import plan_changed_tensors
from ...streaming.digests import TensorHashes, digest_of_files
from ...streaming.encode import encode_tensor
from ...streaming.parallel import choose_device, map_in_order, worker_count
from ...streaming.ranks import current_job
from ...streaming.recode import recode_tensor
from ...streaming.rewrite import ChangedTensor, refuse_overflow, rewrite
from ...streaming.segment import UpdateLoader
from ...undo.reader import belongs
from ...undo.records import RecordedBlock
from ...undo.writer import UndoWriter, adapter_entry, largest_undo, sort_adapters
from ...views.merge import MergeReport
from ...views.parts.writing import command_line
from ..adapter_requests import parse_adapters
from ..arguments import dtype_word, parse_size, parse_words
from ..cards import (
    common_licence,
    described_call,
    few_names,
    folder_of,
    input_word,
    kept_or_none,
    options_of,
    short,
    weighted_word,
)
from ..collector import without_gc
from ..inputs import is_of_mlx, open_inputs, require_residual_base, share_hashes, subtract_initial
from ..merged_models import replaced_files
from .call import Merge
from .replaced import FormerMerge, open_former
from .report import build_report


def merge_card(
    base: Checkpoint, adapters: Sequence[tuple[Adapter, float]], commands: Sequence[str], report: MergeReport
) -> bytes:
    """Return the card of a merge.

    Args:
        commands: lines for a shell: the merge, and its verification.
        report: of the merge; a dry run has no figures.
    """
    folders = [base.root if base.has_side_files else None]
    folders += [folder_of(adapter.name, adapter.file.path) for adapter, _ in adapters]
    licences = [read_licence(folder) for folder in folders]
    names = [adapter.name for adapter, _ in adapters]
    models = dict.fromkeys(filter(None, map(name_on_hub, (report.base, *names))))
    metadata = {
        "base_model": tuple(models),
        "base_model_relation": "merge" if models else "",
        "library_name": _library(base),
        **common_licence(licences),
        "tags": ("lora", "loratool", "merge"),
    }
    replaced = few_names([*map(shown_name, report.replaced)])
    of = f"that of {code(shown_name(report.base))}, a merge with {replaced}" if replaced else ""
    facts = [f"base: {of or code(shown_name(report.base))}{_licence(licences[0])}"]
    facts += [
        f"{code(shown_name(adapter.name))}: {_adapter_facts(adapter, weight)}{_licence(licence)}"
        for (adapter, weight), licence in zip(adapters, licences[1:], strict=True)
    ]
    facts += [
        f"{report.changed} tensors changed, {report.copied} are the base's; "
        f"rounding leaves {kept_or_none(report.kept)} of the delta"
    ]
    facts += [f"excluded: {few_names(report.left_out)}"] if report.left_out else []
    if report.base in report.digests:
        read, written = (code(report.digests[name]) for name in (report.base, report.out))
        facts.append(f"digest of the base {read}, of this model {written}: `loratool inspect --digest .`")
    title = f"{code(shown_name(report.base))} with {few_names([*map(shown_name, names)])}"
    title += f" in place of {replaced}" if replaced else ""
    return ModelCard(title, facts, commands, metadata).encode()


def _library(base: Checkpoint) -> str:
    """Return the hub's name of the library that loads the model. Empty if the files do not show it."""
    if base.parts or "_class_name" in base.config:
        return usual_format("pipeline").key
    if is_of_mlx(base):
        return FORMAT
    if base.has_side_files and (base.root / MODULES).is_file():
        return "sentence-transformers"
    return "transformers" if "model_type" in base.config else ""


def _adapter_facts(adapter: Adapter, weight: float) -> str:
    scales = sorted({update.scale for update in adapter.updates.values() if update.rank and not update.fault})
    scale = f", scale {'..'.join(short(each) for each in dict.fromkeys((scales[0], scales[-1])))}" if scales else ""
    others = f" ({code(spell_weight(weight, adapter.module_weights))})" if adapter.module_weights else ""
    count = len(adapter.updates)
    return f"weight {short(weight)}{others}{scale}, {count} modules of {adapter.format}, sha256 {code(adapter.sha256)}"


def _licence(licence: Mapping[str, str]) -> str:
    return f", licence {code(licence['license'])}" if licence else ""


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Beside:
    """What some merges have beside their plan.

    Attributes:
        like: the open quantized model whose format the output gets.
        former: the merge whose adapters are replaced.
        files: name in the output's folder -> a file to copy there.
    """

    like: Checkpoint | None = None
    former: FormerMerge | None = None
    files: Mapping[str, Path] = field(default_factory=dict)


PROVEN = ("target", "exclude", "layers", "drop", "alpha", "tied", "initial", "residual_base")  # `verify` has them too


def run_merge(call: Merge) -> MergeReport:
    """Add adapters to a base checkpoint and write the merged model, or change the base in place."""
    if call.by is not None:
        raise UsageError("is for changes in place", culprit="--by", remedy="add --in-place, or leave it out")
    with ExitStack() as opened:
        if call.like is not None and call.quantized != "mixed":
            raise UsageError("--like determines how weights are quantized: remove --quantized")
        imitated = None
        planned = plan_call(call, opened)
        if call.like is not None:
            imitated = open_checkpoint(call.like)
            opened.callback(imitated.close)
        plan, inputs = planned.plan, planned.inputs
        former = planned.former
        described = {**described_call(call, inputs), **(former.described if former else {})}
        beside = Beside(imitated, former)
        return write_merged(plan, call, planned.place, describe_merge(plan), described, planned.card, beside)


@dataclass(frozen=True)
class PlannedMerge:
    """The plan of a call of merge, whose inputs are open.

    Attributes:
        place: the output's path, and whether it is a file.
        inputs: the base and the adapters with their weights, as words of a command line.
        card: makes the model card of a folder from the report; None without one.
        former: the merge whose adapters are replaced.
    """

    plan: MergePlan
    place: tuple[Path, bool]
    inputs: Sequence[str]
    card: Callable[[MergeReport], bytes] | None
    former: FormerMerge | None


def plan_call(call: Merge, opened: ExitStack, at: ModelInPlace | None = None) -> PlannedMerge:
    """Open the inputs of a call, and plan it.

    Args:
        at: the base, or the merged model, while it is changed in place.
    """
    requests = parse_adapters(call.adapters, parse_words(call.drop))
    former = open_former(call, opened, at) if call.replace is not None else None
    try:
        base = former.base.checkpoint if former else at.model if at else call.base
        checkpoint, loaded = open_inputs(
            base, requests, call.alpha, opened, "merge", deeper=not (former or call.in_place)
        )
    except NeedsFlag as error:
        if error.asks_for("--alpha"):  # or raise what would be raised if it were known: that of a wrong base, say
            try:
                run_merge(replace(call, alpha=1.0, dry_run=True))
            except UsageError as second:
                if second.culprit != "--alpha":
                    raise
        raise
    if call.initial is None:
        require_residual_base(checkpoint, loaded)
    loaded = subtract_initial(loaded, call.initial, call.residual_base, opened)
    if call.dry_run and not call.resume and len(loaded) == 1:  # of several or for a journal, hashes are read
        ((adapter, weight),) = loaded
        loaded = ((replace(adapter, known_sha256=UNREAD), weight),)
    loaded = share_hashes(loaded)
    place = output_path(call.out, checkpoint, "merged")
    choose_device(call.device)  # is refused before the plan
    selection = Selection.parse(call.target, call.exclude, call.layers)
    choice = ClassChoice(call.architecture, parse_words(call.labels))
    widen = "widen" in parse_words(call.allow)
    plan = without_gc(plan_merge)(checkpoint, loaded, selection, call.tied, choice, widen)
    plan = choose_tokenizer(plan, call.tokenizer, is_file=place[1])
    plan = take_trained_modules(plan, is_file=place[1])
    inputs = [input_word(call.base), *map(weighted_word, sort_adapters(loaded[: len(requests)]))]  # no initial one
    commands = [command_line("merge", *inputs, *options_of(call), "-o", "swapped" if former else "merged")]
    if not former:  # else it needs the base, whose name is not known
        commands.append(command_line("verify", *inputs, "merged", *options_of(call, PROVEN)))
    card = partial(merge_card, checkpoint, sort_adapters(loaded), commands) if call.card else None
    return PlannedMerge(plan, place, inputs, card, former)


def write_merged(
    plan: MergePlan,
    call: Merge,
    place: tuple[Path, bool],
    provenance: str,
    described: Mapping[str, str],
    card: Callable[[MergeReport], bytes] | None = None,
    beside: Beside | None = None,
) -> MergeReport:
    """Write the merged model of a plan.

    Args:
        call: the options, and the name of the base for the report; its other inputs are in the plan.
        place: the output's path, and whether it is a file.
        described: the call for the journal.
        card: makes the model card of a folder from the report.
    """
    path, is_file = place
    beside = beside or Beside()
    like, former = beside.like, beside.former
    base, dtype = os.fspath(call.base), MERGE_DTYPES[dtype_word(call.dtype)]
    if like:
        plan = plan_like(plan, like, dtype)
        if call.undo:
            message = "a merge with --like cannot be undone"
            raise NeedsFlag(message, culprit=str(like.path), flags="--no-undo")
    else:
        plan = plan_codes(plan, call.quantized, dtype, parse_words(call.allow))
    plan = replace(plan, warnings=(*plan.warnings, *(note_of_a_file(plan.edits, plan.base) if is_file else ())))
    inputs = paths_of([*plan.base.shards, *(adapter.file for adapter, _ in plan.adapters)])
    inputs += paths_of(like.shards) if like else []
    inputs += former.paths if former else []
    exists = check_output_path(path, is_file, inputs, call.force, is_model=True, dry_run=call.dry_run)
    lay_out = without_gc(plan_output)
    output = lay_out(
        plan.base,
        path,
        is_file,
        provenance,
        plan.written,
        None if plan.like or plan.base.is_gguf else dtype,
        parse_size(call.max_shard_size),
        plan.edits,
        belongs if call.undo else None,
        plan.base.container,
    )
    read = (*plan.base.shards, *(adapter.file for adapter, _ in plan.adapters))
    read += like.shards if like else ()
    left = replaced_files(former.base.tensors.merged, former.base.undo) if former else ()
    read += tuple(adapter.file for adapter in former.adapters) if former else ()
    if former:
        output = former.carry_undo(output)
    output = replace(
        output,
        left_behind=(*output.left_behind, *left),
        side_files={**output.side_files, **beside.files},
        inputs=read,
        configs=(*output.configs, *(adapter.config for adapter, _ in plan.adapters)),
        call=described,
        resume=call.resume,
    )
    _check_undo(plan, output)
    if call.digest:
        tensors_of(plan.base.original.shards)  # or a name has no digest
    check_undo_files(output, inputs, call.force or call.dry_run)
    largest = None
    if current_job().rank == 0:  # before it writes, for all: the others wait for it in `rewrite`
        if former:
            former.base.undo.require_sound()
        workers = call.workers or worker_count()
        check_factors(plan, workers)
        _check_scales(plan, workers)
        largest = largest_undo(plan, output) if output.undo else None
    planned = build_report(plan, output, base, {}, largest if call.dry_run else None, dry_run=True)
    planned = replace(planned, replaced=former.names if former else ())
    if card and not is_file:
        output = replace(output, extras={**output.extras, CARD: card(planned)})
    if call.dry_run:
        output.require_own_journal()
        warnings = (*planned.warnings, *output.space_warning())
        return replace(planned, exists=exists, free_bytes=free_bytes(output.parent), warnings=warnings)
    return _execute(plan, output, call, card, former)


def describe_merge(plan: MergePlan) -> str:
    """Return what the output of a merge says of its making: the adapters, the arithmetic, what was left out."""
    facts = {
        "adapters": [adapter_entry(adapter, weight) for adapter, weight in sort_adapters(plan.adapters)],
        "arithmetic": ARITHMETIC_VERSION,
        "left_out": sorted(set(plan.excluded)),
    }
    return provenance("merge", facts, plan.base.metadata.get("loratool"))


def check_factors(plan: MergePlan, workers: int) -> None:
    """Read every factor and value once, to refuse damaged ones before the first byte is written."""
    placements = {id(p.update): p for each in plan.requested.values() for p in each}.values()
    _check_small_tensors(((p.adapter.file, name) for p in placements for name in p.update.stored), workers)
    for placement in placements:
        if placement.adapter.file.finite.issuperset(placement.update.stored):
            continue
        if placement.update.base:
            require_finite(TensorRef(placement.adapter.file, placement.update.base))
        if placement.update.cls is ReplaceTensor:
            require_finite(TensorRef(placement.adapter.file, placement.update.tensors["value"]))
        else:
            placement.adapter.load(placement.update)
    for name in plan.added:
        require_finite(plan.sources[name])


def _check_scales(plan: MergePlan, workers: int) -> None:
    """Read the tensors beside touched codes, to refuse damaged ones before the first byte is written."""
    touched = sorted(plan.changed & plan.base.weights.keys())
    beside = (tensor for name in touched for tensor in plan.base.weights[name].tensors[1:])
    _check_small_tensors(((plan.base.shard_of[tensor], tensor) for tensor in beside), workers)
    for name in touched:
        plan.base.parts_of(name).require_sound()


def _check_small_tensors(tensors: Iterable[tuple[WeightsFile, str]], workers: int) -> None:
    """Read small tensors once, and record which are finite."""
    names: dict[WeightsFile, list[str]] = {}
    for file, name in tensors:
        names.setdefault(file, []).append(name)
    for file, file_names in names.items():
        file.finite |= known_finite(file, file_names, partial(map_in_order, workers=workers))


def _check_undo(plan: MergePlan, output: Output) -> None:
    """Raise NeedsFlag if the undo file cannot be written, MachineError if this Python cannot."""
    if output.undo is None:
        return
    require_undoable(plan)
    require_all_layers(plan.base)
    if plan.base.has_side_files and has_card(plan.base.root):
        packer()
    for shard in plan.base.shards:
        if not shard.scattered and not is_place(shard.place):
            message = "has a file name that some systems do not allow, so no undo file can restore it"
            raise NeedsFlag(message, culprit=str(shard.path), flags="--no-undo", why=", or rename it")
        if isinstance(shard, GgufFile) and not shard.is_plain():
            message = "has data between its tensors, which no undo file can restore"
            raise NeedsFlag(message, culprit=str(shard.path), flags="--no-undo")
    for name, spec in plan.base.specs.items():
        if name not in plan.base.weights and output.specs[name].dtype != spec.dtype:
            raise NeedsFlag(
                f"is {spec.dtype} in the base, and a merge into another dtype cannot be undone",
                culprit=name,
                flags="--no-undo",
            )


def _execute(
    plan: MergePlan,
    output: Output,
    call: Merge,
    card: Callable[[MergeReport], bytes] | None,
    former: FormerMerge | None = None,
) -> MergeReport:
    """Write the output. Its card is last, as it has the report's figures."""
    workers, device = call.workers or worker_count(), choose_device(call.device)
    changes: dict[str, list[RoundingStats]] = defaultdict(list)
    steps: Counter[str] = Counter()
    with naming_output(output.path), ExitStack() as opened:
        undo = UndoWriter() if output.undo else None
        load = UpdateLoader(device)
        tensors = plan_changed_tensors(plan, load, undo is not None)
        for codes, name in plan.written.items():
            if name in plan.encoded:
                tensors[codes] = _encode(plan, name, load)
            elif name in plan.recoded:
                tensors[codes] = recode_tensor(plan.base.ref(name), plan.placements[name], load, undo is not None)
        report: MergeReport | None = None

        def finish(targets: Mapping[str, BinaryIO]) -> dict[str, bytes]:
            nonlocal report
            size = None
            if former and hashes:
                former.base.prove(hashes)
            if undo and hashes and output.undo:
                size = undo.finish(targets[output.undo.name], plan, output, hashes.of_read, hashes.of_written)
            report = build_report(plan, output, os.fspath(call.base), changes, size, dry_run=False)
            replaced = former.names if former else ()
            report = replace(report, replaced=replaced, digests=digests_of_merge(plan, output, call, hashes))
            small = {CARD: card(report)} if card and CARD in output.extras else {}
            if former:  # the card has the digest of the base, which the call does not name
                report = replace(report, digests=former.digests(report.digests))
            return small

        beside = plan.edits.beside.keys() - plan.written.keys()
        sources = plan.stored_sources(output.specs.keys() - beside)
        hashes = None
        if undo or call.digest or former:
            copied = {name for name, spec in output.specs.items() if _is_copied(plan, sources.get(name), name, spec)}
            read = former.base.to_hash if former else plan.base.original.shard_of
            hashes = TensorHashes(read, output.specs.keys() - (copied - plan.written.keys()))
        if former:
            tensors |= former.base.rest(sources, tensors)
        runs = rewrite(output, sources, tensors, device, workers, call.progress, finish, hashes)
        for item, blocks in opened.enter_context(closing(runs)):
            if undo and isinstance(blocks[0], RecordedBlock):
                undo.add(item.tensor, item.start, cast("StoredBytes", blocks[0].payload), blocks[0].sum)
                blocks = [block.change for block in blocks]
            if item.tensor in plan.written and plan.written[item.tensor] not in plan.coded:
                refuse_overflow(item.tensor, blocks, plan.sources, output)
            changes[plan.written.get(item.tensor, item.tensor)] += blocks
            for block in blocks:
                steps.update(block.steps)
    counts = (f"{steps[step]:,} {step}" for step in ("dense", "near", "nearer", "exact"))
    logger.debug("weights decided by the GEMM, and asked of each later step, by undo too: %s", ", ".join(counts))
    assert report, "the last item is followed by `finish`"
    return report


def _encode(plan: MergePlan, name: str, load: UpdateLoader) -> ChangedTensor:
    """Return the codes of a weight in the format of the `like` model."""
    assert plan.like
    parts = plan.like.parts_of(name)
    form = FORMS[plan.encoded[name]]
    make = cast("Callable[[], Quantizer]", partial(parts.weight.format.quantizer, parts))
    return encode_tensor(plan.sources[name], plan.placements.get(name, ()), form, make, load)


def _is_copied(plan: MergePlan, source: TensorRef | None, name: str, spec: TensorSpec) -> bool:
    """Return whether a tensor of the output has the stored bytes of the base's tensor of its name."""
    if source is None or source.weight or source.span or source.name != name:
        return False
    return source.file is plan.base.shard_of.get(name) and plan.base.stored[name] == spec


def digests_of_merge(plan: MergePlan, output: Output, call: Merge, hashes: TensorHashes | None) -> dict[str, str]:
    """Return the digests of the adapters and, if their hashes are known, of the base and of the output.

    They are by the names that the call has.
    """
    files = [member for adapter, _ in plan.adapters for member in adapter.file.members]
    names = chain.from_iterable(file.specs for file in files)
    if not has_digest(chain(plan.base.stored, output.specs, names) if hashes else names):
        return {}
    adapters = {adapter.name: digest_of_files(adapter.file.members) for adapter, _ in plan.adapters}
    if hashes is None:
        return adapters
    base = plan.base.original
    written = {
        name: hashes.of_written.get(name) or hashes.of_read.get(plan.base.stored_name(name), [])
        for name in output.specs
    }
    stored = tensors_of(base.shards)
    return {
        os.fspath(call.base): digest_of((name, base.stored[name], hashes.of_read[name]) for name in stored),
        **adapters,
        str(output.path): digest_of((name, output.specs[name], written[name]) for name in sorted(written)),
    }
