"""What a merge will do, decided from headers before the first byte: where every row comes from, and what changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..adapters.adapter import Adapter, UpdateSpec
from ..adapters.updates import ADDITIVE
from ..architectures.prefixes import module_path
from ..errors import InputError, NeedsFlag
from ..files.checkpoint import Checkpoint
from ..files.dtypes import FLOAT8, TensorSpec
from ..files.output import OutputEdits
from ..files.side_files import tokenizer_files
from ..files.tensor_compare import same_values
from ..files.tensor_ref import TensorRef
from .classifier_heads import classifier_edits
from .placement import Placement
from .resolve import Binding, absent_from_adapter, bind, refuse_second_nonadditive
from .selection import Selection
from .tied_weights import ResolvedTie, Tie, bindable, find_tie, resolve_tie, vocabulary_edits, vocabulary_names


@dataclass(frozen=True)
class MergePlan:
    """bound: the placements of each tensor as asked for. placements: those that are left once each tensor's source
    is settled. added: the tensors that the base does not have. edits: what of the output is not the base's.
    """

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    requested: Mapping[str, tuple[Placement, ...]]
    sources: Mapping[str, TensorRef]
    placements: Mapping[str, tuple[Placement, ...]]
    left_out: tuple[str, ...]
    added: tuple[str, ...]
    untied: tuple[str, ...]
    warnings: tuple[str, ...]
    edits: OutputEdits

    @cached_property
    def changed(self) -> set[str]:
        """The tensors whose values need not be the base's."""
        own = {name for name, source in self.sources.items() if source.file is not self.base.shard_of.get(name)}
        return own | set(self.placements)


def plan_merge(
    base: Checkpoint, adapters: tuple[tuple[Adapter, float], ...], selection: Selection, tied: str
) -> MergePlan:
    """Raises what `require_used`, `bind`, `settle_tie` and `settle_source` raise; InputError for an update of codes."""
    tie = find_tie(base)
    specs, coded = bindable(base, tie)
    names = " and ".join(adapter.name for adapter, _ in adapters)
    modules = [module for adapter, _ in adapters for module in adapter.updates]
    selection.require_used([*modules, *map(module_path, base.specs)], f"{names} or the base")
    binding = bind(specs, base.model_types, adapters, selection, coded)
    _refuse_quantized(base, binding)
    settled = resolve_tie(base, tie, binding.placements, tied)
    sources, placements = _resolve_row_sources(base, tie, settled)
    for name, (adapter, update) in binding.added.items():
        sources[name] = TensorRef(adapter.file, update.tensors["value"])
    edits, notes = _plan_edits(base, [adapter for adapter, _ in adapters], tie, settled, sources)
    warnings = (*settled.warnings, *notes, *(note for adapter, _ in adapters for note in adapter.notes))
    for adapter, _ in adapters:
        changed = [name for name, found in binding.placements.items() if any(p.adapter is adapter for p in found)]
        warnings += tuple(f"{adapter.name}: {line}" for line in absent_from_adapter(base.specs, adapter, changed))
    for shard in base.shards:
        if shard.ignored:
            warnings += (f"{shard.place} also holds {', '.join(shard.ignored)}, which is not read",)
    if binding.added:
        warnings += (f"{len(binding.added)} tensors are not in the base and are added: {', '.join(binding.added)}",)
    return MergePlan(
        base,
        adapters,
        settled.placements,
        sources,
        placements,
        binding.left_out,
        tuple(binding.added),
        tuple(name for name in settled.untied if name not in base.specs),
        warnings,
        edits,
    )


def _refuse_quantized(base: Checkpoint, binding: Binding) -> None:
    """Raise InputError for an update of a weight that is stored as codes."""
    for adapter, name, form in binding.quantized.values():
        count = len(binding.quantized)
        others = f", as are {count - 1} more that the adapter changes" if count > 1 else ""
        own = adapter.config.base_model in (str(base.path), None)
        raise InputError(
            f"is quantized ({form}), and its codes are no weights{others}",
            culprit=name,
            remedy="pass the original model in 16 or 32 bits" + ("" if own else f"; {adapter.base_hint}"),
        )


def _resolve_row_sources(
    base: Checkpoint, tie: Tie | None, settled: ResolvedTie
) -> tuple[dict[str, TensorRef], dict[str, tuple[Placement, ...]]]:
    sources = {name: TensorRef(shard, name) for name, shard in base.shard_of.items()}
    placements = {}
    if tie and settled.untied:
        _share_replacement(tie, settled, sources)
    for name, found in settled.placements.items():
        refuse_second_nonadditive(name, found)
        sources[name], rest = resolve_row_source(sources[name], found)
        if rest:
            _require_rows(sources[name], rest)
            refuse_second_nonadditive(name, rest)
            placements[name] = rest
    return sources, placements


def _share_replacement(tie: Tie, settled: ResolvedTie, sources: dict[str, TensorRef]) -> None:
    """Sides that part were one matrix under the adapter: what it brought along for one side lies under all."""
    under = sources[tie.embedding]
    for name in settled.untied:
        sources.setdefault(name, sources[tie.stored_as(name)])
    names = [tie.embedding, *(name for name in settled.untied if tie.stored_as(name) == tie.embedding)]
    brought = [settled.placements[n] for n in names if any(p.update.base for p in settled.placements.get(n, ()))]
    for name in names:
        if brought and name not in settled.placements:
            sources[name], _ = resolve_row_source(under, brought[0])


def _require_rows(source: TensorRef, placements: Sequence[Placement]) -> None:
    """All placements are for the rows that there are: two adapters may have been made for two vocabularies."""
    shape = source.spec.shape or (1,)
    whole = {shape[0], shape[0] * shape[1]} if len(shape) > 2 else {shape[0]}
    for placement in placements:
        if placement.rows not in whole or placement.rows != placements[0].rows:
            raise InputError(
                f"has {shape[0]} rows now, but {placement.adapter.name} is for {placement.rows}", culprit=source.name
            )


def resolve_row_source(base: TensorRef, placements: Sequence[Placement]) -> tuple[TensorRef, tuple[Placement, ...]]:
    """Where a tensor's rows come from, and the placements that are left to apply to them.

    A replacement of full weight is a source of its own, and so is the weight that an adapter brought along for its
    LoRA, unless the base's own has the same values. Raises InputError where that cannot be had.
    """
    source, rest = base, []
    brought = [_replacement_value(base, placement) for placement in placements]
    if len({id(p.adapter) for p, own in zip(placements, brought, strict=True) if own}) > 1:
        raise InputError("two adapters bring their own values for it", culprit=base.name, remedy="merge one of them")
    for placement, own in zip(placements, brought, strict=True):
        if own is None:
            rest.append(placement)
        elif placement.weight == 1:
            source = own
            rest += [] if placement.update.kind == "replace" else [placement]
        elif own.spec.shape != base.spec.shape or placement.update.kind not in (*ADDITIVE, "replace"):
            raise InputError(f"{placement.adapter.name} brings its own values: its weight must be 1", culprit=base.name)
        else:
            value = {"value": own.name}
            replaced = UpdateSpec("replace", placement.update.module, value, {"value": own.spec})
            rest.append(replace(placement, update=replaced, transposed=False, skip=0, expert=None))
            rest += [] if placement.update.kind == "replace" else [placement]
    return source, tuple(rest)


def _replacement_value(base: TensorRef, placement: Placement) -> TensorRef | None:
    """The values that an update puts in the place of the base's, before it adds anything."""
    update, file = placement.update, placement.adapter.file
    if update.kind == "replace":
        return TensorRef(file, update.tensors["value"])
    if update.base is None or same_values(base, TensorRef(file, update.base)):
        return None
    return TensorRef(file, update.base)


def _plan_edits(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    tie: Tie | None,
    settled: ResolvedTie,
    sources: Mapping[str, TensorRef],
) -> tuple[OutputEdits, tuple[str, ...]]:
    """What the output has otherwise than the base, and what to say of it."""
    specs = {}
    for name, source in sources.items():
        like = base.specs.get(name) or (
            base.specs[tie.stored_as(name)] if tie and name in settled.untied else source.spec
        )
        if name not in base.specs or source.spec.shape != like.shape:
            specs[name] = TensorSpec(like.dtype, source.spec.shape)
    words = [name for name in vocabulary_names(base, tie) if name in sources]
    rows = {name: sources[name].spec.shape[0] for name in words}
    resized = {name: n for name, n in rows.items() if base.specs.get(name, base.specs[words[0]]).shape[0] != n}
    config = vocabulary_edits(base, rows, resized)
    classifier, unknown = classifier_edits(base, adapters, sources)
    config |= classifier
    if tie and settled.untied and not tie.keeps_flag:
        config["tie_word_embeddings"] = False
    others = [name for name in specs if name in base.specs and name not in words]
    sized = [name for name in others if specs[name].shape != base.specs[name].shape and "id2label" not in classifier]
    touched = [p for name in words for p in settled.placements.get(name, ())]
    files, notes = _find_tokenizer(touched)
    notes += unknown + tuple(
        f"{name} has {specs[name].shape[0]} rows now; set num_labels to that when loading" for name in sized
    )
    return OutputEdits(specs, config, files), notes


def widen_float8(plan: MergePlan, dtype: str | None) -> OutputEdits:
    """The edits with the type of changed 8-bit tensors, in which no change would survive: NeedsFlag without one."""
    specs = dict(plan.edits.specs)
    for name in plan.changed:
        spec = specs.get(name) or plan.base.specs[name]
        if spec.dtype in FLOAT8 and dtype is None:
            raise NeedsFlag(
                f"is {spec.dtype}, too coarse for a change", culprit=name, remedy="add --dtype bf16 --no-undo"
            )
        if spec.dtype in FLOAT8 and dtype is not None:
            specs[name] = TensorSpec(dtype, spec.shape)
    return replace(plan.edits, specs=specs)


def _find_tokenizer(placements: list[Placement]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The tokenizer that an adapter has beside it, if it changed the vocabulary's rows; of two adapters, neither."""
    folders = {p.adapter.file.path.parent: tokenizer_files(p.adapter.file.path.parent) for p in placements}
    found = {folder: files for folder, files in folders.items() if files}
    if len(found) > 1:
        return {}, ("several adapters have a tokenizer beside them; the base's is kept",)
    files = next(iter(found.values()), {})
    return files, (f"the tokenizer is that of {next(iter(found))}",) if files else ()
