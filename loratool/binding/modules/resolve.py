"""Bind an adapter's module paths to the base's tensors, by names and shapes only.

The class that an adapter was trained on may have other paths than the file, so one side may have a prefix that the
other lacks. Prefixes are not guessed: the base's names must resolve all paths of the adapter in the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ...adapters.adapter import Adapter
from ...adapters.formats.sam import other_depth
from ...adapters.updates.diff import Diff
from ...adapters.updates.replace import ReplaceTensor
from ...adapters.updates.update import UpdateSpec
from ...architectures.backbones import BACKBONES
from ...architectures.classes import classes_of
from ...architectures.components import components_of
from ...architectures.experts import HALVED_EXPERTS, ExpertPart, expert_part
from ...architectures.fused_rows import Configs, RowPart, row_parts
from ...architectures.image import SCALE, image_modules
from ...architectures.numbered_names import split_numbers
from ...architectures.prefixes import CONTAINER_PREFIXES, KOHYA_PREFIXES, PEFT_PREFIX, WRAPPERS, module_path
from ...architectures.renames import canonical
from ...errors import InputError, LoratoolError
from ...files.codecs.quantized import Coded, with_coded
from ...files.dtypes import TensorSpec
from .misfits import Fit, misfit_error, misfits
from .module_weights import require_patterns_used, weight_of
from .placement import Match, Placement, ShapeError, place_update
from .selection import Selection

# of a module that the base lacks, and of which the adapter has more than factors
_WITH_WEIGHT = (
    "the adapter has its weight, and LoRA on it: first save the base as a model with this module, of any numbers, "
    "which the merge replaces"
)
_TEXT = re.compile(r"^model\.(?=(?:layers|embed_tokens|norm)(?:\.|$))")
_WRAPPED_TEXT = re.compile(r"^(?:model\.(?:language_model|text_model)|language_model\.model)\.")


@dataclass(frozen=True)
class Binding:
    """The base tensors of all updates of all adapters."""

    placements: Mapping[str, tuple[Placement, ...]]  # by base tensor
    excluded: tuple[str, ...]  # module paths that the selection excludes
    added: Mapping[str, tuple[Adapter, UpdateSpec]]  # new tensors by name, for example a classifier
    quantized: Mapping[str, tuple[Adapter, str, str]]  # module -> (adapter, the quantized weight's name, its format)


def bind(
    specs: Mapping[str, TensorSpec],
    configs: Configs,
    adapters: Sequence[tuple[Adapter, float]],
    selection: Selection,
    coded: Mapping[str, Coded] | None = None,
) -> Binding:
    """Find the base tensor of every update.

    Args:
        configs: the base's config.json and its nested configs, by model type.
        adapters: adapters with their weights.
        coded: the base's quantized weights, which get no placements.

    Raises:
        NeedsFlag: some paths do not bind; the error has --exclude options with which the rest does.
        InputError: most paths do not bind, a path is ambiguous, or the shapes contradict each other.
    """
    specs = with_coded(specs, coded or {})
    formats = {name: c.format for weight, c in (coded or {}).items() for name in (weight, *c.tensors)}
    resolved = [(adapter, weight, *resolve_modules(specs, adapter, configs)) for adapter, weight in adapters]
    for adapter, _, found, _ in resolved:
        if adapter.by_order:
            _require_every_layer(adapter, found, specs)
    chosen = [_select_matches(selection, matches) for _, _, matches, _ in resolved]
    missing = [[m for m in absent if selection.selects(m)] for _, _, _, absent in resolved]
    added: dict[str, tuple[Adapter, UpdateSpec]] = {}
    for (adapter, weight), absent in zip(adapters, missing, strict=True):
        for module in [m for m in absent if adapter.in_modules_to_save(m)]:
            absent.remove(module)
            update = adapter.updates[module]
            key = update.tensors["value"]
            name = module + key.removeprefix(module_path(key))
            if name in added or weight_of(adapter, weight, module) != 1:
                raise InputError("is not in the base: one adapter may bring it, with weight 1", culprit=name)
            added[name] = adapter, update

    def misfit() -> LoratoolError:
        """Return the error for all modules that do not fit; this checks every shape again."""
        fits = []
        for (adapter, _), selected, absent in zip(adapters, chosen, missing, strict=True):
            plain = {m: each for m, each in selected.items() if formats.keys().isdisjoint(match.name for match in each)}
            fits.append(Fit(adapter, selected, absent, misfits(adapter, plain, specs, tuple(configs))))

        def bound_without(patterns: Sequence[str]) -> Binding:
            rest = replace(selection, exclude=(*selection.exclude, *patterns))
            return bind(specs, configs, adapters, rest, coded)

        reasons = _reasons((m for absent in missing for m in absent), specs, configs)
        for (adapter, _), absent in zip(adapters, missing, strict=True):
            reasons |= {module: _WITH_WEIGHT for module in absent if adapter.updates[module].base}
        return misfit_error(fits, specs, list(added), reasons, bound_without)

    if any(missing):
        raise misfit()
    require_patterns_used(
        (adapter, {*adapter.updates, *(module_path(match.name) for each in matches.values() for match in each)})
        for adapter, _, matches, _ in resolved
        if adapter.module_weights
    )
    placements: dict[str, list[Placement]] = {}
    quantized: dict[str, tuple[Adapter, str, str]] = {}
    for (adapter, weight, _, _), selected in zip(resolved, chosen, strict=True):
        holders: dict[Match, str] = {}
        for module, matches in selected.items():
            for match in matches:
                if match in holders:
                    raise InputError(
                        f"{holders[match]} and {module} of {adapter.name} both bind to it", culprit=match.name
                    )
                holders[match] = module
                if match.name in formats:
                    quantized[module] = (adapter, match.name, formats[match.name])
                    continue
                module_weight = weight_of(adapter, weight, module, module_path(match.name))
                try:
                    of_match = place_update(adapter, module, module_weight, match, specs, tuple(configs), selected)
                except ShapeError as error:
                    raise misfit() from error
                placements.setdefault(match.name, []).extend(of_match)
    if not placements and not added and not quantized:
        raise InputError(
            "no module of any adapter is selected, so there is nothing to do", remedy="loosen the selection"
        )
    used = {module for selected in chosen for module in selected} | {update.module for _, update in added.values()}
    named = [(m, every, absent) for adapter, _, every, absent in resolved for m in adapter.updates]
    excluded = [m for m, every, absent in named if m not in used and (m in every or m in absent)]
    for (_, _, every, _), selected in zip(resolved, chosen, strict=True):
        excluded += [
            match.name
            for module, selected_matches in selected.items()
            for match in every[module]
            if match not in selected_matches
        ]
    placed = {name: tuple(placements[name]) for name in specs if name in placements}
    return Binding(placed, tuple(excluded), added, quantized)


def _select_matches(selection: Selection, matches: Mapping[str, Sequence[Match]]) -> dict[str, tuple[Match, ...]]:
    """Return the selected matches of each module, by the adapter's path or the base's."""
    selected = {m: tuple(s for s in each if selection.selects(m, module_path(s.name))) for m, each in matches.items()}
    return {module: matches_of_module for module, matches_of_module in selected.items() if matches_of_module}


def _require_every_layer(
    adapter: Adapter, matches: Mapping[str, Sequence[Match]], specs: Mapping[str, TensorSpec]
) -> None:
    """Raise InputError if the base has other layers than an adapter whose file numbers them by order alone."""
    layers = [module for module, update in adapter.updates.items() if update.rank]
    stems = {split_numbers(match.name)[0] for module in layers for match in matches.get(module, ())}
    depth = sum(split_numbers(name)[0] in stems for name in specs)
    if depth not in (0, len(layers)):
        raise other_depth(adapter.name, len(layers), depth)


def refuse_second_nonadditive(name: str, placements: Sequence[Placement]) -> None:
    """Raise InputError for two updates of the same rows if one is not additive: their order would matter."""
    for placement in placements:
        if placement.update.cls.mixes:
            _require_whole_blocks(name, placement, placements)
    if len(placements) < 2:
        return
    last: Placement | None = None
    for placement in sorted((p for p in placements if not p.update.additive), key=lambda p: p.start):
        if last and placement.start < last.stop:
            what = f"{last.update.kind} of {last.adapter.name} and {placement.update.kind} of {placement.adapter.name}"
            remedy = "merge them one after the other" if last.adapter is not placement.adapter else None
            if not (last.update.cls.in_turn and placement.update.cls.in_turn):
                remedy = "peft sums their changes of the base: merge them with it, and `loratool extract` the change"
            raise InputError(f"{what} do not add up", culprit=name, remedy=remedy)
        last = placement


def _require_whole_blocks(name: str, placement: Placement, placements: Sequence[Placement]) -> None:
    """Raise InputError if an update that mixes rows has not all rows of a block here, or another ends inside of one."""
    together, rows = placement.together, placement.stop - placement.start
    whose = f"{placement.update.module} of {placement.adapter.name}"
    own = placement.update.cls.flat(placement.update)[int(placement.transposed)]
    if placement.skip % together or (rows % together and own is not None and placement.skip + rows != own):
        remedy = "pass a base that has the module as one tensor"
        message = f"{whose} mixes blocks of {together} rows, and only a part of one is in the tensor"
        raise InputError(message, culprit=name, remedy=remedy)
    edges = {edge for p in placements for edge in (p.start, p.stop)}
    if any((edge - placement.start) % together for edge in edges if placement.start < edge < placement.stop):
        remedy = "merge them one after the other"
        message = f"{whose} mixes blocks of {together} rows, and another update changes a part of one"
        raise InputError(message, culprit=name, remedy=remedy)


def rows_together(placements: Sequence[Placement]) -> int:
    """Return of how many rows the blocks are into which all updates of a tensor divide their rows."""
    together = 1
    for placement in placements:
        if placement.update.cls.mixes:
            together = math.lcm(together, placement.together)
    return together


def resolve_modules(
    specs: Mapping[str, TensorSpec], adapter: Adapter, configs: Configs
) -> tuple[dict[str, tuple[Match, ...]], list[str]]:
    """Find the base tensors of an adapter's module paths.

    Both sides' names are converted to current transformers' names. Then these ways are tried on all paths at once: the
    paths unchanged, the paths as those of another class of the base, and every addition or removal of one container
    prefix. The way that resolves most paths counts; unchanged paths win ties.

    Returns:
        The matches by module path, and the paths that the base lacks.

    Raises:
        InputError: two ways resolve equally many paths and contradict each other.
    """
    matches, rest, absent = _resolve_image(specs, adapter)
    by_name, missing = _resolve_names(specs, adapter, rest, configs) if rest else ({}, [])
    missing = [module for module in (*absent, *missing) if not adapter.updates[module].optional]
    return {**matches, **by_name}, missing


def _resolve_image(
    specs: Mapping[str, TensorSpec], adapter: Adapter
) -> tuple[dict[str, tuple[Match, ...]], list[str], list[str]]:
    """Return the matches of an image model's modules, the paths of other modules, and the missing paths."""
    modules = image_modules({name: spec.shape for name, spec in specs.items()})
    if not modules:
        return {}, list(adapter.updates), []
    matches: dict[str, tuple[Match, ...]] = {}
    rest: list[str] = []
    absent: list[str] = []
    for module, update in adapter.updates.items():
        components, path = components_of(module)
        flat = adapter.flattened or "." not in path
        of = path.removesuffix(SCALE) if update.cls in (ReplaceTensor, Diff) else path
        candidates = (modules.find(each, of, flat) for each in components or ("unet", "text_encoder"))
        where = next(filter(None, candidates), ())
        if where and (update.additive or not update.cls.in_stored_layout):
            matches[module] = tuple(Match(r.tensor, rows=(r.start, r.stop, r.skip, r.module_rows)) for r in where)
        elif (
            update.cls is ReplaceTensor and len(where) == 1 and where[0].module_rows == specs[where[0].tensor].shape[0]
        ):
            matches[module] = (Match(where[0].tensor),)
        else:
            (absent if components and (update.rank or modules.holds(path, flat)) else rest).append(module)
    return matches, rest, absent


def _resolve_names(
    specs: Mapping[str, TensorSpec], adapter: Adapter, modules: Sequence[str], configs: Configs
) -> tuple[dict[str, tuple[Match, ...]], list[str]]:
    """Find modules under the base's names, and return those that the base lacks."""
    separator = "_" if adapter.flattened else "."
    model_types = tuple(configs)
    index, stacks = _index(specs, configs, separator)
    plain = {module: _canonical_path(module, adapter.flattened, model_types) for module in modules}
    rest = [m for m, path in plain.items() if path not in index and path not in stacks and not adapter.flattened]
    parts = {m: part for m in rest if (part := expert_part(m, model_types))}
    of_stack = _in_stacks(parts, index, stacks)

    def known(module: str, path: str) -> bool:
        return path in index or path in stacks or module in of_stack

    ways = [plain]
    if not all(known(m, path) for m, path in plain.items()):
        for model_class in classes_of(next(iter(configs.values()), {})).values() if not adapter.flattened else ():
            in_main = {m: path if known(m, path) else model_class.in_main_class(path) for m, path in plain.items()}
            ways.append({m: canonical(path, model_types) for m, path in in_main.items()})
        if not adapter.flattened:  # a model for images or sound and only its language model, or the reverse
            for start, other in ((_WRAPPED_TEXT, "model."), (_TEXT, "model.language_model.")):
                ways.append({m: path if known(m, path) else start.sub(other, path) for m, path in plain.items()})
        backbones = [prefix for each in model_types if (prefix := BACKBONES.get(each))]
        for container in dict.fromkeys((*CONTAINER_PREFIXES, *backbones)):
            prefix = container.replace(".", separator) + separator
            ways.append({m: path if known(m, path) else prefix + path for m, path in plain.items()})
            ways.append({m: path if known(m, path) else path.removeprefix(prefix) for m, path in plain.items()})
    resolved = [{m: path for m, path in way.items() if known(m, path)} for way in ways]
    most_resolved = max(len(way) for way in resolved)
    best = [way for way in resolved if len(way) == most_resolved]
    if len(best[0]) == len(resolved[0]):
        best = best[:1]
    matches: dict[str, tuple[Match, ...]] = {}
    for module in best[0]:
        paths = [way[module] for way in best if module in way]
        names = sorted({name for path in paths for name in index.get(path, [])})
        names += [match.name for path in paths for match in stacks.get(path, ())][:1] if names else []
        if len(names) > 1:
            raise InputError(f"of {adapter.name} could be any of {', '.join(names)}", culprit=module)
        if names:
            matches[module] = (Match(names[0]),)
        elif best[0][module] in stacks:
            stacked = stacks[best[0][module]]
            update = adapter.updates[module]
            if (
                stacked[0].rows
                and update.cls.in_stored_layout
                and not update.additive
                and update.cls is not ReplaceTensor
            ):
                continue  # it has no part for a region of rows
            _require_complete(adapter, module, stacked)
            matches[module] = stacked
        else:
            matches[module] = of_stack[module]
    return matches, [m for m in plain if m not in matches and not adapter.is_duplicate_bias(m, matches)]


def _in_stacks(
    parts: Mapping[str, ExpertPart], index: Mapping[str, Sequence[str]], stacks: Mapping[str, Sequence[Match]]
) -> dict[str, tuple[Match, ...]]:
    """Return the places of separate experts' matrices in stacks of the base; a stack may have only a share of the rows.

    Args:
        parts: module -> the matrices of separate experts; matrices that are in no stack are skipped.
    """
    halves: dict[tuple[str, int, int], list[str]] = {}
    for fused in {part.fused for part in parts.values()}:
        for match in stacks.get(fused, ()):
            if match.expert is None and not match.rows:
                halves.setdefault((fused, match.part, match.parts), []).append(match.name)
    in_stacks: dict[str, tuple[Match, ...]] = {}
    for module, part in parts.items():
        if part.fused in index:
            in_stacks[module] = (Match(index[part.fused][0], part.expert, part.part, part.parts),)
        elif names := halves.get((part.fused, part.part, part.parts)):
            in_stacks[module] = tuple(Match(name, part.expert) for name in names)
    return in_stacks


def absent_from_adapter(names: Iterable[str], adapter: Adapter, changed: Iterable[str]) -> list[str]:
    """Return a warning for everything that the config lists and the base has, but the adapter lacks.

    Args:
        names: the base's tensors.
        changed: the tensors that the adapter changes.
    """
    names, trained, saved = list(names), adapter.config.peft.get("bias"), adapter.config.peft.get("modules_to_save")
    lines = list(adapter.missing)
    for entry in (each for each in (saved if isinstance(saved, list) else []) if isinstance(each, str)):
        line = f"the config's modules_to_save names {entry}, but the file has no tensors of it"
        # PEFT matches the end of a name, so that `norm` also matches a layernorm; here only the full name counts
        of_base = any(f".{entry}." in f".{name}" for name in names)
        of_adapter = any(
            f".{entry}." in f".{m}." for m, update in adapter.updates.items() if update.cls is ReplaceTensor
        )
        lines += [line] if of_base and not of_adapter and line not in lines else []
    if trained in ("all", "lora_only") and not any(m.endswith(".bias") for m in adapter.updates):
        biases = {name for name in names if name.endswith(".bias")}
        if trained == "lora_only":
            biases &= {f"{module_path(name)}.bias" for name in changed}
        lines += [f"the config sets bias to {trained}, but the file has no bias"] if biases else []
    return lines


def _require_complete(adapter: Adapter, module: str, matches: Sequence[Match]) -> None:
    """Raise InputError if an update has more rows, or a stack more slices, than its matches: some would be ignored."""
    ranges = [match.rows for match in matches if match.rows]
    if ranges:
        has, total = sum(stop - start for start, stop, _, _ in ranges), ranges[0][3]
        if has != total:
            raise InputError(f"of {adapter.name} has {total} rows, but the base has {has} of them", culprit=module)
        return
    experts: Sequence[int | None] = [None] if matches[0].expert is None else range(adapter.updates[module].experts)
    expected = {(expert, part) for expert in experts for part in range(matches[0].parts)}
    present = {(match.expert, match.part) for match in matches}
    if present != expected:
        has = len({match.expert for match in matches})
        what = (
            f"has {has} experts" if has != len(experts) else f"is missing a part of {len(expected - present)} of them"
        )
        raise InputError(f"of {adapter.name} is for {len(experts)} experts, but the base {what}", culprit=module)


def _index(
    specs: Mapping[str, TensorSpec], configs: Configs, separator: str
) -> tuple[dict[str, list[str]], dict[str, tuple[Match, ...]]]:
    """Return the base's tensors by module path, and by the paths of modules that are rows of one tensor or of several.

    The latter are stacks of experts with separate tensors in the file, and the modules in `fused_rows`.
    """
    model_types = tuple(configs)
    index: dict[str, list[str]] = {}
    several: dict[str, list[Match]] = {}
    for name, spec in specs.items():
        path = module_path(canonical(strip_wrappers(module_path(name)).removeprefix(PEFT_PREFIX), model_types))
        index.setdefault(path.replace(".", separator), []).append(name)
        part = expert_part(strip_wrappers(name), model_types)
        if part:
            fused = part.fused.replace(".", separator)
            several.setdefault(fused, []).append(Match(name, part.expert, part.part, part.parts))
        for rows in fused_parts(name, spec, configs):
            if not rows.permuted:
                several.setdefault(rows.module.replace(".", separator), []).append(_match_rows(name, spec, rows))
    for halves in (HALVED_EXPERTS[each] for each in model_types if each in HALVED_EXPERTS):
        for path in [path for path in several if ".experts." in path]:
            first_half, second_half = _halve(several.pop(path))
            several |= {
                path.replace(".experts.", halves[0]): first_half,
                path.replace(".experts.", halves[1]): second_half,
            }
    return index, {module: tuple(matches) for module, matches in several.items()}


def _halve(matches: Sequence[Match]) -> tuple[list[Match], list[Match]]:
    """Return the matches of the first half of the experts, and of the second half, counted from 0 again."""
    numbered = [(match.expert or 0, match) for match in matches]
    half = (max(number for number, _ in numbered) + 2) // 2
    others = [replace(match, expert=number - half) for number, match in numbered if number >= half]
    return [match for number, match in numbered if number < half], others


def fused_parts(name: str, spec: TensorSpec, configs: Configs) -> tuple[RowPart, ...]:
    """Return the modules of the class whose rows a tensor has (`fused_rows.row_parts`); for a stack, per expert."""
    rows = spec.shape[-2:][:1]
    return row_parts(strip_wrappers(name), tuple(configs), configs, rows[0]) if rows else ()


def _match_rows(name: str, spec: TensorSpec, rows: RowPart) -> Match:
    if len(spec.shape) == 3:  # a stack: each matrix has these rows
        size = rows.stop - rows.start
        return Match(name, None, rows.skip // size, rows.module_rows // size)
    return Match(name, rows=(rows.start, rows.stop, rows.skip, rows.module_rows))


def strip_wrappers(path: str) -> str:
    """Return a path without the wrappers of training loops."""
    parts = path.split(".")
    return path if WRAPPERS.isdisjoint(parts) else ".".join(part for part in parts if part not in WRAPPERS)


def _canonical_path(module: str, flattened: bool, model_types: Sequence[str]) -> str:
    if not flattened:
        return module_path(canonical(strip_wrappers(module), model_types))
    return next((module.removeprefix(p) for p in KOHYA_PREFIXES if module.startswith(p)), module)


def _reasons(absent: Iterable[str], specs: Mapping[str, TensorSpec], configs: Configs) -> dict[str, str]:
    """Return module -> why it does not bind, for modules whose rows are within another tensor of the base."""
    rows = {part.module: (name, part) for name, spec in specs.items() for part in fused_parts(name, spec, configs)}
    reasons = {}
    for module in absent:
        name, part = rows.get(canonical(strip_wrappers(module), tuple(configs)), ("", None))
        if part and part.permuted:
            reasons[module] = f"its rows are in {name}, in another order than transformers' class has them"
        elif part:
            reasons[module] = f"it is part of {name}; this update can only replace a whole tensor"
    return reasons
