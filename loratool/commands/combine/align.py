"""Align several adapters from their headers: group their updates by module, and plan the sum of all other tensors.

Low-rank updates and lora_B's biases add up. A replacement value V (modules_to_save, biases, rows of trained tokens)
has the delta V - W, and sum w_i (V_i - W) is the delta of sum w_i V_i only if the weights sum to 1. Otherwise the base
would be needed. Such modules, and all others without a sum, are refused by name: nothing is excluded silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

from ...adapters.adapter import Adapter
from ...adapters.config import is_in_listed_module
from ...adapters.edited import CARRIED, CarriedTensor
from ...adapters.formats import capabilities
from ...adapters.formats.peft import DECLARED, nested
from ...adapters.formats.peft_config import base_mutating_init, listed_as_parameters
from ...adapters.updates.add import AddDelta
from ...adapters.updates.diff import Diff
from ...adapters.updates.dora import DoRA
from ...adapters.updates.replace import ReplaceTensor
from ...adapters.updates.rows import ReplaceRows, indices_of
from ...adapters.updates.update import UpdateSpec
from ...binding.modules.misfits import exclude_options, exclude_patterns
from ...binding.modules.resolve import strip_wrappers
from ...binding.modules.selection import Selection
from ...errors import InputError, LoratoolError, NeedsFlag
from ...files.tensor_compare import same_values
from ...files.tensor_ref import TensorRef
from ...transform.in_memory import CommonFormat

ROUNDING = 1e-9  # tolerance for the sum 1 of decimal weights


@dataclass(frozen=True)
class WeightedUpdate:
    """An adapter's update of a module, with its weight there."""

    adapter: Adapter
    weight: float
    update: UpdateSpec
    origins: tuple[str, ...]  # the modules of the adapter's file that it is made of

    def source(self, role: str) -> TensorRef:
        return TensorRef(self.adapter.file, self.update.tensors[role])


UpdateGroup = tuple[WeightedUpdate, ...]


@dataclass(frozen=True)
class AlignedAdapters:
    """Several adapters, aligned for their combination."""

    groups: Mapping[str, UpdateGroup]  # module -> its low-rank updates
    updates: Mapping[str, UpdateSpec]  # module -> the update with the output's tensor names and shapes
    carried: Mapping[str, CarriedTensor]  # tensor of the output -> its sum, for tensors other than factors
    fields: Mapping[str, object]  # of PEFT's config, that differ from the first adapter's
    left_out: tuple[str, ...]  # modules that --target and --exclude leave out
    warnings: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the files, in which they do not differ
    differing: tuple[str, ...] = ()  # keys of the rest


def align_adapters(
    alike: CommonFormat, weights: Sequence[Mapping[str, float]], target: tuple[str, ...], linear: bool
) -> AlignedAdapters:
    """Align adapters of one format and naming.

    Args:
        weights: of each adapter, module of its file -> weight.
        target: patterns of modules to combine, by their names in the output or in a file; empty for all.
        linear: whether the method is the sum, which for one adapter is that adapter.

    Raises:
        InputError: the adapters are of different bases, or have no factors to combine; or a module is made from
            modules with different weights, or only some of its parts are targets.
        NeedsFlag: some updates have no sum, and would have to be excluded.
    """
    adapters, by_module = [state.adapter for state in alike.states], dict[str, list[WeightedUpdate]]()
    _check_together(adapters)
    for state, adapter_weights in zip(alike.states, weights, strict=True):
        adapter, distinct = state.adapter, set(adapter_weights.values())
        for module, update in adapter.updates.items():
            origins = state.log[module].sources
            weight = (
                next(iter(distinct))
                if len(distinct) == 1
                else _common_weight(adapter, module, origins, adapter_weights)
            )
            by_module.setdefault(module, []).append(WeightedUpdate(adapter, weight, update, origins))
    names = " and ".join(adapter.name for adapter in adapters)
    selection, targets = Selection(exclude=alike.exclude), Selection(target)
    selection.require_used(by_module, names)
    targets.require_used(
        {*by_module, *(o for group in by_module.values() for each in group for o in each.origins)}, names
    )
    selected = {m: tuple(g) for m, g in by_module.items() if selection.selects(m) and _is_target(targets, m, g)}
    problems = _problems(selected, adapters, linear)
    groups = {module: group for module, group in selected.items() if group[0].update.rank and module not in problems}
    if problems:
        raise _refusal(problems, [module for module in by_module if module not in problems], bool(groups))
    if not groups:
        raise InputError("have no low-rank factors to combine", culprit=", ".join(a.name for a in adapters))
    carried: dict[str, CarriedTensor] = {}
    for group in selected.values():
        carried |= _sum_other_tensors(group)
    has_config = capabilities(adapters[0]).alpha == "config"
    fields = _config_fields(adapters, {m: g[0].update for m, g in selected.items()}) if has_config else {}
    left_out = tuple(module for module in by_module if module not in selected)
    return AlignedAdapters(groups, _with_nesting(groups), carried, fields, left_out, _warnings(adapters))


def _common_weight(adapter: Adapter, module: str, origins: Sequence[str], weights: Mapping[str, float]) -> float:
    """Return the weight of a module. Raise InputError if the modules that it is made from have different weights."""
    if missing := next((origin for origin in origins if origin not in weights), None):
        raise InputError(f"has no weight in {adapter.name}, since no module of the file is {missing}", culprit=module)
    by_weight = {weights[origin]: origin for origin in origins}
    if len(by_weight) > 1:
        (first_weight, a), (second_weight, b), *_ = by_weight.items()
        raise InputError(
            f"fuses {a} and {b} of {adapter.name}, which have the weights {first_weight:g} and {second_weight:g}",
            culprit=module,
            remedy="give them the same weight, or choose a format with --to that splits them",
        )
    return next(iter(by_weight))


def _is_target(selection: Selection, module: str, group: Sequence[WeightedUpdate]) -> bool:
    """Return whether one of a module's names is selected. Raise InputError if only a part of it is."""
    if selection.selects(module):
        return True
    by_adapter = {member.adapter.name: [selection.selects(origin) for origin in member.origins] for member in group}
    part = next((name for name, selected in by_adapter.items() if any(selected) and not all(selected)), None)
    if part:
        raise InputError(
            f"fuses modules of {part}, but --target selects only some of them",
            culprit=module,
            remedy="select all of them, or choose a format with --to that splits them",
        )
    return any(any(selected) for selected in by_adapter.values())


def _check_together(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    for adapter in adapters[1:]:
        _check_names(first, adapter)
    plain = [adapter.name for adapter in adapters if not base_mutating_init(adapter.config)]
    mutating = [adapter for adapter in adapters if base_mutating_init(adapter.config)]
    if mutating and plain:
        init = base_mutating_init(mutating[0].config)
        raise InputError(
            f"was initialized with {init}, which changed its base, but {plain[0]} was not: they do not share a base",
            culprit=mutating[0].name,
        )
    other = next((each for each in mutating if _base_mutating_inits(each) != _base_mutating_inits(mutating[0])), None)
    if other:
        inits, theirs = (" and ".join(f"{part} {init}".strip() for part, init in _base_mutating_inits(each).items())
                    for each in (mutating[0], other))  # fmt: skip
        message = f"was initialized with {inits}, {other.name} with {theirs}: they do not share a base"
        raise InputError(message, culprit=mutating[0].name)


def _base_mutating_inits(adapter: Adapter) -> dict[str, str]:
    """Return the base-mutating init of each component. A single one has the empty name."""
    inits = dict(adapter.config.base_mutating_inits) or {"": base_mutating_init(adapter.config) or ""}
    return {component: init.lower() for component, init in inits.items()}


def _check_names(first: Adapter, second: Adapter) -> None:
    """Raise InputError for two adapters with different names for the same modules: a loader would find only one.

    Either some paths have the wrapper of a training loop, or all have a prefix.
    """
    plain = {strip_wrappers(module): module for module in first.updates}
    for module in second.updates:
        other = plain.get(strip_wrappers(module), module)
        if other != module:
            raise InputError(
                f"is in {second.name}, and {first.name} calls it {other}: one was saved with wrappers", culprit=module
            )
    paths = [{module for module, update in adapter.updates.items() if update.rank} for adapter in (first, second)]
    if not all(paths) or paths[0] & paths[1] or first.flattened:
        return
    for (short, name), (long, other) in permutations(zip(paths, (first.name, second.name), strict=True)):
        ends = {path.split(".", n)[-1]: path for path in long for n in range(1, path.count(".") + 1)}
        if all(path in ends for path in short):
            path = min(short)
            raise InputError(
                f"is in {name}, and {other} calls it {ends[path]}: they belong to two model classes", culprit=path
            )


def _problems(groups: Mapping[str, UpdateGroup], adapters: Sequence[Adapter], linear: bool) -> dict[str, str]:
    """Return module -> the reason why its updates have no sum."""
    alone = linear and len(adapters) == 1
    problems = {module: _problem(module, group, alone) for module, group in groups.items()}
    if capabilities(adapters[0]).alpha == "config" and listed_as_parameters(
        group[0].update for group in groups.values()
    ):
        biases = [module for module, group in groups.items() if group[0].update.cls is AddDelta]
        problems |= dict.fromkeys(
            biases, "is a lora_bias; PEFT cannot load one together with target_parameters (experts)"
        )
    return {module: problem for module, problem in problems.items() if problem}


def _problem(module: str, group: UpdateGroup, alone: bool) -> str | None:
    """Return the reason why these updates have no sum, or None.

    Raises:
        InputError: their shapes are of different bases, so that --exclude would not help.
    """
    first, *others = group
    for other in others:
        if other.update.cls is not first.update.cls:
            return f"is {first.update.kind} in {first.adapter.name}, {other.update.kind} in {other.adapter.name}"
        skip = 1 if first.update.cls is ReplaceRows else 0
        shapes = [member.update.shape[skip:] for member in (first, other)]
        if shapes[0] != shapes[1] or other.update.transposed != first.update.transposed:
            first_shape, other_shape = (
                f"{_describe_shape(member)} in {member.adapter.name}" for member in (first, other)
            )
            raise InputError(f"is {first_shape}, {other_shape}: their bases differ", culprit=module)
    bases = [TensorRef(member.adapter.file, member.update.base) for member in group if member.update.base]
    if any(not same_values(bases[0], base) for base in bases[1:]):
        return "has a different base weight in each adapter"
    if first.update.cls is DoRA and not (alone and first.weight == 1):
        return f"is DoRA in {first.adapter.name}, and its delta depends on the base: use merge"
    if not first.update.rank and first.update.cls not in CARRIED:
        return f"is {first.update.kind} in {first.adapter.name}, which has no factors"
    if first.update.cls in (ReplaceTensor, ReplaceRows):
        return _replacement_problem(group)
    return None


def _describe_shape(member: WeightedUpdate) -> str:
    shape = "x".join(map(str, member.update.shape)) or "a scalar"
    return f"{shape}{' of an embedding' if member.update.transposed and member.update.rank else ''}"


def _replacement_problem(group: UpdateGroup) -> str | None:
    total = math.fsum(member.weight for member in group)
    if abs(total - 1) > ROUNDING:
        names = " and ".join(member.adapter.name for member in group)
        return f"is a full tensor in {names}; their weights sum to {total:g}, and must sum to 1 as the base is unknown"
    if any(member.update.detail != group[0].update.detail for member in group):
        return "has different rows in each adapter"
    return None


def _refusal(problems: Mapping[str, str], combinable_modules: Sequence[str], combinable: bool) -> LoratoolError:
    module, reason = next(iter(problems.items()))
    reason += f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
    if combinable:
        return NeedsFlag(
            reason, culprit=module, flags=exclude_options(exclude_patterns(list(problems), combinable_modules))
        )
    return InputError(reason, culprit=module)


def _sum_other_tensors(group: UpdateGroup) -> dict[str, CarriedTensor]:
    """Return the sums of the tensors other than factors, under the first adapter's names."""
    first, sums = group[0], {}
    cls = first.update.cls
    if cls in (AddDelta, Diff):
        (role,) = first.update.tensors
        terms = [(member.source(role), member.weight * member.update.scale) for member in group]
        sums[first.update.tensors[role]] = CarriedTensor(tuple(terms))
    if cls in (ReplaceTensor, ReplaceRows):
        sources = [member.source("value") for member in group]
        equal = all(same_values(sources[0], source) for source in sources[1:])
        terms = [(sources[0], 1.0)] if equal else [(m.source("value"), m.weight) for m in group]
        sums[first.update.tensors["value"]] = CarriedTensor(tuple(terms))
    if cls is DoRA:
        sums[first.update.tensors["magnitude"]] = CarriedTensor(((first.source("magnitude"), 1.0),))
    based = next((member for member in group if member.update.base), None)
    if based and based.update.base:
        sums[based.update.base] = CarriedTensor(((TensorRef(based.adapter.file, based.update.base), 1.0),))
    return sums


def _with_nesting(groups: Mapping[str, UpdateGroup]) -> dict[str, UpdateSpec]:
    """Return the first adapter's updates, with the names that PEFT gives to stacks of experts in this combination.

    PEFT nests the parameters of one module, so their names depend on which of them are targets.
    """
    updates = {module: group[0].update for module, group in groups.items()}
    owners: dict[str, list[str]] = {}
    for module, update in updates.items():
        nests = update.cls.stack and ".lora_A" in update.tensors["A"]  # as PEFT spells them
        if nests and not update.parameter:  # jetmoe's are weights of modules of their own
            owner, _, parameter = module.rpartition(".")
            owners.setdefault(owner, []).append(parameter)
    for owner, parameters in owners.items():
        unknown = [parameter for parameter in parameters if parameter not in DECLARED]
        if unknown and len(parameters) > 1:
            raise InputError("is beside other parameters, and their order is unknown", culprit=f"{owner}.{unknown[0]}")
        paths = {parameters[0]: owner} if unknown else nested(owner, parameters, DECLARED)
        for parameter, path in paths.items():
            update = updates[f"{owner}.{parameter}"]
            depth = path.removeprefix(owner)
            tensors = {
                role: re.sub(r"(\.base_layer)*(\.lora_[AB]\b)", rf"{depth}\2", key)
                for role, key in update.tensors.items()
            }
            updates[f"{owner}.{parameter}"] = replace(update, tensors=tensors)
    return updates


def _config_fields(adapters: Sequence[Adapter], updates: Mapping[str, UpdateSpec]) -> dict[str, object]:
    """Return the fields of PEFT's config that must differ from the first adapter's.

    Targets are full paths, so the fields that limit them by layer or pattern are removed.
    """
    configs = [adapter.config.peft for adapter in adapters]
    fields: dict[str, object] = {
        name: None for name in ("layers_to_transform", "layers_pattern", "exclude_modules") if configs[0].get(name)
    }
    replaced = [module for module, update in updates.items() if update.cls is ReplaceTensor]
    excluded = [
        m for adapter in adapters for m, u in adapter.updates.items() if u.cls is ReplaceTensor and m not in updates
    ]
    lists = [config.get("modules_to_save") for config in configs]
    entries = [entry for each in lists if isinstance(each, list) for entry in each if isinstance(entry, str)]
    saved = [
        entry
        for entry in dict.fromkeys(entries)
        if any(is_in_listed_module(entry, module) for module in replaced)
        or not any(is_in_listed_module(entry, module) for module in excluded)
    ]
    fields["modules_to_save"] = saved or None
    biases = [each for each in (config.get("bias") for config in configs) if each in ("all", "lora_only")]
    replaces_biases = any(module.endswith(".bias") for module in replaced)
    fields["bias"] = ("all" if "all" in biases else biases[0]) if biases and replaces_biases else "none"
    fields["lora_bias"] = any(update.cls is AddDelta for update in updates.values())
    if fields["lora_bias"] and not base_mutating_init(adapters[0].config):
        # PEFT takes no other init beside lora_bias; the factors are trained anyway
        fields["init_lora_weights"] = True
    if listed_as_parameters(updates.values()):  # PEFT takes no dropout beside target_parameters
        fields["lora_dropout"] = 0.0
    fields["trainable_token_indices"] = _token_indices(adapters, updates)
    # an absent field means the same as null or false
    return {name: value for name, value in fields.items() if value not in (None, False) or configs[0].get(name)}


def _token_indices(adapters: Sequence[Adapter], updates: Mapping[str, UpdateSpec]) -> object:
    """Return the first adapter's field if it covers all trained rows, else the rows by module."""
    rows = {module: update for module, update in updates.items() if update.cls is ReplaceRows}
    first = adapters[0]
    first_rows = [module for module, update in first.updates.items() if update.cls is ReplaceRows]
    if set(first_rows) == set(rows):
        return first.config.peft.get("trainable_token_indices") if rows else None
    return {module: list(indices_of(update)) for module, update in rows.items()}


def _warnings(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    lines = [f"{adapter.name}: {line}" for adapter in adapters for line in adapter.missing]
    first = adapters[0]
    for adapter in adapters[1:]:
        first_base, other_base = first.config.base_model, adapter.config.base_model
        if first_base and other_base and first_base != other_base:
            lines.append(f"{adapter.name} was trained on {other_base}, but {first.name} on {first_base}")
    if base_mutating_init(first.config):
        lines.append(
            f"{first.name} was initialized with {base_mutating_init(first.config)}, which changed its base: use the "
            "result on that base, and only if all adapters have the same"
        )
    return tuple(dict.fromkeys(lines))
