"""Plan a merge from headers, before anything is written: the source and the updates of every row."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ...adapters.adapter import Adapter
from ...adapters.updates.replace import ReplaceTensor
from ...adapters.updates.update import UpdateSpec
from ...architectures.prefixes import module_path
from ...errors import InputError, NeedsFlag
from ...files.checkpoint import Checkpoint
from ...files.codecs.quantized import remedy_of
from ...files.dtypes import TensorSpec
from ...files.layer_numbers import RepeatedLayers
from ...files.output.output import OutputEdits
from ...files.tensor_compare import same_values
from ...files.tensor_ref import TensorRef
from ..modules.beside import beside_weights
from ..modules.placement import Placement
from ..modules.resolve import Binding, absent_from_adapter, bind, refuse_second_nonadditive
from ..modules.selection import Selection
from ..names.base_names import notes_on_base
from ..ties.shared_tensors import bindable, resolve_shared
from ..ties.tied_weights import ResolvedTie, resolve_tie, vocabulary_edits
from ..ties.ties import Tie, find_tie, vocabulary_names
from .classifier_heads import ClassChoice, class_edits
from .repeated_layers import notes_on_layers
from .widened import Widened, find_widened

NO_CHOICE = ClassChoice()


@dataclass(frozen=True)
class MergePlan:
    """The decisions of a merge, by the names of the output's tensors."""

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]  # with their weights
    requested: Mapping[str, tuple[Placement, ...]]  # all placements, before replacements became sources
    sources: Mapping[str, TensorRef]  # the source of each tensor of the output
    placements: Mapping[str, tuple[Placement, ...]]  # the placements to apply to the sources
    excluded: tuple[str, ...]  # modules that --drop and the selection exclude
    added: tuple[str, ...]  # tensors that the base lacks
    untied: tuple[str, ...]  # tensors that the base stores only under another name
    warnings: tuple[str, ...]
    edits: OutputEdits  # types, shapes, config and files that differ from the base's
    notes: tuple[str, ...] = ()  # choices that need a line but no warning
    # of `coded_bases.plan_codes`
    way: str | None = None  # a key of WAYS; None if nothing coded is touched
    decoded: Mapping[str, str] = field(default_factory=dict)  # weights that are only dequantized -> module that asks
    recoded: frozenset[str] = frozenset()  # weights that are written as codes with the base's scales
    # of `likeness.plan_like`
    encoded: Mapping[str, str] = field(default_factory=dict)  # weights that are quantized -> their type before that
    like: Checkpoint | None = None  # the model that has these codes

    @cached_property
    def changed(self) -> set[str]:
        """The tensors with values that can differ from the base's."""
        stored, holder = self.base.specs, self.base.shard_of
        codes = {name: weight.tensors[0] for name, weight in self.base.weights.items()}
        replaced = {
            n for n, source in self.sources.items() if n not in stored or source.file is not holder[codes.get(n, n)]
        }
        return replaced | set(self.placements) | self.decoded.keys() | self.encoded.keys()

    @cached_property
    def written(self) -> dict[str, str]:
        """The tensors of the output with other bytes -> the weights that they are, or whose codes they are."""
        stored = {name: self.base.weights[name].tensors[0] for name in self.recoded}
        if self.like:
            stored = {name: self.like.weights[name].tensors[0] for name in self.encoded}
        return {stored.get(name, name): name for name in self.changed}

    @cached_property
    def base_layers(self) -> RepeatedLayers | None:
        """The base's layers among those of a model that repeats them: the copies that an undo file restores."""
        return self.base.layers.least_changed(self.written) if self.base.layers else None

    def restores_base(self, name: str) -> bool:
        """Return whether an undo file restores the base from a tensor of the output, not from another copy."""
        if self.base_layers is None:
            return True
        return self.base_layers.number_of(name) in (None, *self.base_layers.numbers)

    @property
    def coded(self) -> Collection[str]:
        """The weights that are written as codes."""
        return self.recoded or self.encoded.keys()

    def stored_sources(self, names: Iterable[str]) -> dict[str, TensorRef]:
        """Return the source of each tensor of the output; those of an unchanged weight are copied unchanged.

        The source of codes that are written again is their weight.
        """
        coded = {codes: self.sources[name] for codes, name in self.written.items() if name in self.coded}
        stay_codes = self.base.weights.keys() - (self.changed - self.recoded)
        decoded = self.sources.keys() - stay_codes
        others = (name for name in names if name not in coded)
        return coded | {n: self.sources[n] if n in decoded else self.base.stored_ref(n) for n in others}


def plan_merge(
    base: Checkpoint,
    adapters: tuple[tuple[Adapter, float], ...],
    selection: Selection,
    tied: str,
    choice: ClassChoice = NO_CHOICE,
    widen: bool | None = None,
) -> MergePlan:
    """Plan a merge from names, shapes and headers.

    Args:
        tied: a key of TIED.
        choice: the class and the labels for the output's config.
        widen: add columns of zeros to an image model's input for a control adapter; False to name the flag that allows
            it, None to refuse such an adapter.

    Raises:
        InputError: a pattern matches nothing, an update does not fit the base or a second update, its weight is
            quantized, or the choice does not fit the head.
        NeedsFlag: a module is not in the base, or a tie would break, and an option can resolve it.
    """
    tie = find_tie(base)
    specs, coded = bindable(base, tie)
    widened = Widened() if widen is None else find_widened(base, [adapter for adapter, _ in adapters])
    specs = {**specs, **widened.specs}
    names = " and ".join(adapter.name for adapter, _ in adapters)
    modules = [module for adapter, _ in adapters for module in adapter.updates]
    selection.require_used([*modules, *map(module_path, base.specs)], f"{names} or the base")
    binding = bind(specs, base.configs, adapters, selection, coded)
    _refuse_quantized(base, binding)
    for name, spec in widened.specs.items() if not widen else ():
        message = f"has {base.specs[name].shape[1]} inputs, and an adapter {spec.shape[1]}, as for a control image"
        raise NeedsFlag(message, culprit=name, flags="--allow widen", why="to add columns of zeros")
    resolved = resolve_tie(base, tie, resolve_shared(base, binding.placements), tied)
    sources, placements = _resolve_row_sources(base, tie, resolved, widened.sources(base))
    for name, (adapter, update) in binding.added.items():
        sources[name] = TensorRef(adapter.file, update.tensors["value"])
    named = class_edits(base, [adapter for adapter, weight in adapters if weight > 0], sources, choice)
    edits, warned = _plan_edits(base, tie, resolved, sources, named.fields)
    edits = replace(edits, configs={**edits.configs, **widened.configs})
    warnings = (*resolved.warnings, *warned, *named.warnings)
    warnings += tuple(note for adapter, _ in adapters for note in adapter.notes)
    for adapter, _ in adapters:
        changed = [name for name, placed in binding.placements.items() if any(p.adapter is adapter for p in placed)]
        warnings += tuple(f"{adapter.name}: {line}" for line in absent_from_adapter(base.specs, adapter, changed))
    for shard in base.shards:
        if shard.ignored:
            warnings += (f"{shard.place} also holds {', '.join(shard.ignored)}, which is not read",)
    if binding.added:
        warnings += (f"{len(binding.added)} tensors are not in the base and are added: {', '.join(binding.added)}",)
    return MergePlan(
        base=base,
        adapters=adapters,
        requested=resolved.placements,
        sources=sources,
        placements=beside_weights(placements, sources),
        excluded=(*(name for adapter, _ in adapters for name in adapter.excluded), *binding.excluded),
        added=tuple(binding.added),
        untied=tuple(name for name in resolved.untied if name not in base.specs),
        warnings=warnings,
        edits=edits,
        notes=(*notes_on_base(base, [adapter for adapter, _ in adapters]), *notes_on_layers(base), *named.notes),
    )


def _refuse_quantized(base: Checkpoint, binding: Binding) -> None:
    """Raise InputError for an update of a quantized weight."""
    for adapter, name, form in binding.quantized.values():
        count = len(binding.quantized)
        others = f"; {count - 1} more that the adapter changes are, too" if count > 1 else ""
        coded = base.coded.get(name)
        why = f": {coded.fault}" if coded and coded.fault else ", and its codes cannot be changed"
        is_its_base = adapter.config.base_model in (str(base.path), None)
        raise InputError(
            f"is quantized ({form}){why}{others}",
            culprit=name,
            remedy=remedy_of(form) + ("" if is_its_base else f"; {adapter.base_hint}"),
        )


def _resolve_row_sources(
    base: Checkpoint, tie: Tie | None, resolved: ResolvedTie, widened: Mapping[str, TensorRef]
) -> tuple[dict[str, TensorRef], dict[str, tuple[Placement, ...]]]:
    """Return the source of each tensor's rows, and the placements to apply to them."""
    sources = {name: base.ref(name) for name in base.specs} | {**widened}
    placements = {}
    if tie and resolved.untied:
        _share_replacement(tie, resolved, sources)
    for name, requested in resolved.placements.items():
        refuse_second_nonadditive(name, requested)
        sources[name], rest = resolve_row_source(sources[name], requested)
        if rest:
            _refuse_replaced_stack(sources[name], requested, rest)
            _require_rows(sources[name], rest)
            refuse_second_nonadditive(name, rest)
            placements[name] = rest
    return sources, placements


def _share_replacement(tie: Tie, resolved: ResolvedTie, sources: dict[str, TensorRef]) -> None:
    """Set the source of all untied sides to the weight that an adapter has for one of them.

    They were one matrix when the adapter was trained.
    """
    under = sources[tie.embedding]
    for name in resolved.untied:
        sources.setdefault(name, sources[tie.stored_as(name)])
    names = [tie.embedding, *(name for name in resolved.untied if tie.stored_as(name) == tie.embedding)]
    replacing = [resolved.placements[n] for n in names if any(p.update.base for p in resolved.placements.get(n, ()))]
    for name in names:
        if replacing and name not in resolved.placements:
            sources[name], _ = resolve_row_source(under, replacing[0])


def _refuse_replaced_stack(source: TensorRef, requested: Sequence[Placement], placements: Sequence[Placement]) -> None:
    """Raise InputError for a stack of matrices that one adapter replaces and another adds to."""
    stacked = next((p for p in placements if p.expert is not None), None)
    replacing = next((p for p in requested if p.adapter.file is source.file), None)
    if stacked and replacing:
        raise InputError(
            f"{replacing.adapter.name} replaces it, and {stacked.adapter.name} adds to its experts",
            culprit=replacing.update.module,
            remedy="merge them one after the other",
        )


def _require_rows(source: TensorRef, placements: Sequence[Placement]) -> None:
    """Raise InputError for placements for another number of rows, as of two adapters with different vocabularies."""
    shape = source.spec.shape or (1,)
    row_counts = {shape[0], shape[0] * shape[1]} if len(shape) > 2 else {shape[0]}
    for placement in placements:
        if placement.rows not in row_counts or placement.rows != placements[0].rows:
            raise InputError(
                f"has {shape[0]} rows now, but {placement.adapter.name} is for {placement.rows}", culprit=source.name
            )


def resolve_row_source(base: TensorRef, placements: Sequence[Placement]) -> tuple[TensorRef, tuple[Placement, ...]]:
    """Return the source of a tensor's rows, and the placements to apply to them.

    A replacement with weight 1 becomes the source. So does the weight that an adapter stores under its LoRA
    (modules_to_save), unless the base has the same values. A replacement with another weight stays a placement.

    Raises:
        InputError: two adapters replace the tensor, or a replacement that needs weight 1 has another.
    """
    source, rest = base, []
    values = [_replacement_value(base, placement) for placement in placements]
    if len({id(p.adapter) for p, value in zip(placements, values, strict=True) if value}) > 1:
        raise InputError("two adapters bring their own values for it", culprit=base.name, remedy="merge one of them")
    for placement, value in zip(placements, values, strict=True):
        if value is None:
            rest.append(placement)
        elif placement.weight == 1:
            source = value
            rest += [] if placement.update.cls is ReplaceTensor else [placement]
        elif value.spec.shape != base.spec.shape or not (
            placement.update.additive or placement.update.cls is ReplaceTensor
        ):
            raise InputError(f"{placement.adapter.name} brings its own values: its weight must be 1", culprit=base.name)
        else:
            tensors = {"value": value.name}
            replaced = UpdateSpec(ReplaceTensor, placement.update.module, tensors, {"value": value.spec})
            rest.append(replace(placement, update=replaced, transposed=False, skip=0, expert=None))
            rest += [] if placement.update.cls is ReplaceTensor else [placement]
    return source, tuple(rest)


def _replacement_value(base: TensorRef, placement: Placement) -> TensorRef | None:
    """Return the values that replace the base's before an update is added; None if it replaces nothing."""
    update, file = placement.update, placement.adapter.file
    if update.cls is ReplaceTensor:
        is_whole = (placement.start, placement.stop, placement.skip) == (0, placement.rows, 0)
        return TensorRef(file, update.tensors["value"]) if is_whole else None
    if update.base is None or same_values(base, TensorRef(file, update.base)):
        return None
    return TensorRef(file, update.base)


def _plan_edits(
    base: Checkpoint,
    tie: Tie | None,
    resolved: ResolvedTie,
    sources: Mapping[str, TensorRef],
    top: Mapping[str, Any],
) -> tuple[OutputEdits, tuple[str, ...]]:
    """Return the output's differences from the base, and warnings about them.

    top: fields of config.json for class and labels.
    """
    specs = {}
    for name, source in sources.items():
        like = base.specs.get(name) or (
            base.specs[tie.stored_as(name)] if tie and name in resolved.untied else source.spec
        )
        if name not in base.specs or source.spec.shape != like.shape:
            specs[name] = TensorSpec(like.dtype, source.spec.shape)
    words = [name for name in vocabulary_names(base, tie) if name in sources]
    rows = {name: sources[name].spec.shape[0] for name in words}
    resized = {name: n for name, n in rows.items() if base.specs.get(name, base.specs[words[0]]).shape[0] != n}
    config = vocabulary_edits(base, rows, resized)
    if tie and resolved.untied and not tie.keeps_flag:
        config["tie_word_embeddings"] = False
    others = [name for name in specs if name in base.specs and name not in words]
    sized = [name for name in others if specs[name].shape[:1] != base.specs[name].shape[:1] and "id2label" not in top]
    notes = tuple(f"{name} has {specs[name].shape[0]} rows now; set num_labels to that when loading" for name in sized)
    return OutputEdits(specs, config, top), notes
