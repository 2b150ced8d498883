"""Rename a language model's adapter to the names of the class that PEFT wraps, which depend on its base.

An adapter has the names of the class and of the version of transformers that it was trained with, or those of the
files. PEFT loads nothing under a name that its class does not have. Tensors keep their bytes. If the class has a stack
of experts, factors of single experts become factors of the stack: the slices' ranks one after another, with zeros for
missing ones (as PEFT's `utils/transformers_weight_conversion.py`). Scales are written as alpha / r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS
from ..adapters.formats.peft import Peft, wrappers_of
from ..adapters.placed_factors import Place, lay_A, lay_B, place_pairs, starts
from ..adapters.updates.experts import Experts
from ..adapters.updates.low_rank import LowRank
from ..adapters.updates.oft import OFT
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.rows import Indices
from ..adapters.updates.update import Stack, UpdateSpec
from ..adapters.weight_kinds import WEIGHT_KINDS
from ..architectures.experts import ExpertPart, expert_part
from ..architectures.prefixes import module_path
from ..binding.modules.placement import Match, place_update
from ..binding.modules.resolve import fused_parts, resolve_modules
from ..binding.names.class_names import ClassNames
from ..binding.names.peft_names import is_bare, is_bare_router, names_not_found, refuse_family, target_modules
from ..binding.ties.shared_tensors import bindable
from ..binding.ties.ties import find_tie
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.dtypes import TensorSpec
from ..numerics.arrays import Numbers, recast
from ..numerics.forms import F64, Bits, holding
from .lazy import Made, Tensors, Transformed, has_numbers, with_modules
from .log import NO_LOSS, Loss
from .numbers import natural
from .refusals import cannot_convert

_ENDS = WEIGHT_KINDS["experts"].keys


@dataclass(frozen=True)
class _Stack:
    """Updates of single experts that are one parameter in the class."""

    path: str
    experts: int
    parts: int  # equal slices of the rows of each expert
    modules: dict[tuple[int, int], UpdateSpec] = field(default_factory=dict)  # by (expert, slice)

    @property
    def ranks(self) -> list[int]:
        """The rank of each slice, the largest of any expert."""
        by_slice = [[u.rank for (_, part), u in self.modules.items() if part == index] for index in range(self.parts)]
        return [max(ranks, default=0) for ranks in by_slice]

    def plan(self, source: Adapter, wrapper: str) -> Made:
        """Return the stack in PEFT's layout, A (E * r, in) and B (out, r * E); each number is the source's or 0."""
        first = next(iter(self.modules.values()))
        (rows, width), ranks = first.shape, self.ranks
        stored = holding(*map(natural, self.modules.values()))
        between_steps = any(has_numbers(source.file, update.module) for update in self.modules.values())
        form = F64 if between_steps else stored

        def make() -> tuple[Tensors, Loss]:
            A, B = place_pairs(pairs(), (self.experts, rows * self.parts, sum(ranks), width))
            return {"A": Numbers(lay_A(A), form), "B": Numbers(lay_B(B), form)}, NO_LOSS

        def pairs() -> Iterator[tuple[tuple[Bits, Bits], Place]]:
            firsts = starts(ranks)
            for (expert, part), update in self.modules.items():
                loaded = source.load(update)
                assert isinstance(loaded, LowRank)
                place = Place(firsts[part], slice(part * rows, (part + 1) * rows), expert)
                yield (recast(loaded.A, form).bits, recast(loaded.B, form).bits), place

        count = sum(ranks) * self.experts
        shapes = {"A": (count, width), "B": (rows * self.parts, count)}
        update = UpdateSpec(
            Experts,
            self.path,
            {role: f"{wrapper}.{end}" for role, end in zip("AB", _ENDS, strict=True)},
            {role: TensorSpec(stored.name, shape) for role, shape in shapes.items()},
            first.scale,
            detail=Stack(self.experts),
        )
        return Made(update, make, tuple(member.module for member in self.modules.values()), "fused", numbers=False)


@dataclass(frozen=True)
class _Places:
    """The updates' places in the class."""

    paths: dict[str, str] = field(default_factory=dict)  # module of the source -> module or parameter of the class
    stacks: dict[str, _Stack] = field(default_factory=dict)  # by the parameter's path
    parameters: set[str] = field(default_factory=set)  # of `paths`, those that PEFT takes as `target_parameters`


def to_class(state: Transformed, base: Checkpoint, architecture: str | None) -> Transformed:
    """Rename the modules to the names of a class of the base, from headers alone.

    Raises:
        NeedsFlag: a module is not in the base or the class.
        InputError: a shape differs from the base's, or the experts of a stack have several scales.
        UsageError: the base has no class of that name.
    """
    places = _place(state.adapter, base, architecture, state.adapter.updates)
    moved = _moved(state, places)
    parameters = {u.target for u in moved.adapter.updates.values() if u.cls.stack or u.parameter}
    named = sorted(
        u.target for u in moved.adapter.updates.values() if (u.rank or u.cls is OFT) and u.target not in parameters
    )
    return with_fields(moved, target_modules=target_modules(base, ClassNames(base, architecture), named))


def with_paths(state: Transformed, paths: Mapping[str, str]) -> Transformed:
    """Rename modules. paths: present path -> new path; the last names of stacks of experts must stay."""
    updates = state.adapter.updates
    parameters = {path for module, path in paths.items() if updates[module].parameter}
    return _moved(state, _Places(dict(paths), {}, parameters))


def with_fields(state: Transformed, **fields: object) -> Transformed:
    """Return the adapter with other fields in PEFT's config."""
    config = state.adapter.config
    changed = replace(config, peft={**config.peft, **fields})
    return replace(state, adapter=replace(state.adapter, config=changed))


def _moved(state: Transformed, places: _Places) -> Transformed:
    """Return the adapter with the updates at their places."""
    source = state.adapter
    updates = source.updates
    single = {update.module for stack in places.stacks.values() for update in stack.modules.values()}
    others = {module: update for module, update in updates.items() if module not in single}
    stacked = [places.paths[module] for module, update in others.items() if update.cls.stack]
    wrappers = wrappers_of([*places.stacks, *stacked])
    keys = dict[str, str]()
    saved = {module_role: key for key, module_role in FORMATS[Peft.key].names(source, others).items()}
    moved = {}
    for module, update in others.items():
        stored = {**update.tensors, **({"base": update.base} if update.base else {})}
        new = {role: _new_key(saved[module, role], module, update, places, wrappers) for role in stored}
        keys |= {new[role]: name for role, name in stored.items()}
        base = new.pop("base", None)
        path = places.paths[module]
        is_parameter = path in places.parameters
        moved[module] = replace(update, module=path, tensors=new, base=base, parameter=is_parameter)
    planned = {path: stack.plan(source, wrappers[path]) for path, stack in places.stacks.items()}
    changed = with_modules(state, planned, moved, keys, Peft.key)
    return with_fields(_without_version(changed) if places.stacks else changed, **_fields(source, updates, places))


def _without_version(state: Transformed) -> Transformed:
    """Remove the version of PEFT, which determines the layout of a stack's A and B."""
    config = state.adapter.config
    peft = {key: value for key, value in config.peft.items() if key != "peft_version"}
    return replace(state, adapter=replace(state.adapter, config=replace(config, peft=peft)))


def _fields(source: Adapter, updates: Mapping[str, UpdateSpec], places: _Places) -> dict[str, object]:
    """Return the fields of PEFT's config that name modules other than those with factors."""
    fields, peft = dict[str, object](), source.config.peft
    if peft.get("modules_to_save"):
        saved = {places.paths[m] for m, u in updates.items() if u.cls is ReplaceTensor and not m.endswith(".bias")}
        fields["modules_to_save"] = sorted(saved) or None
    tokens = peft.get("trainable_token_indices")
    if isinstance(tokens, dict):
        indices_of = {m: u.detail.indices for m, u in updates.items() if isinstance(u.detail, Indices)}
        rest = {k: v for k, v in tokens.items() if not any(f".{m}".endswith(f".{k}") for m in indices_of)}
        renamed = {places.paths[m]: list(indices) for m, indices in indices_of.items()}
        fields["trainable_token_indices"] = {**rest, **renamed}
    return fields


def _place(source: Adapter, base: Checkpoint, architecture: str | None, updates: Mapping[str, UpdateSpec]) -> _Places:
    """Find each update's place in the class, and check its shape against the base's."""
    refuse_family(base)
    specs, _ = bindable(base, find_tie(base))
    matches, absent = resolve_modules(specs, source.only(updates), base.configs)
    added = [module for module in absent if source.in_modules_to_save(module)]
    if len(added) < len(absent):
        unknown = [m for m in absent if m not in added]
        raise cannot_convert(source.name, f"are not in {base.path}", unknown, among=updates)
    in_model, places = ClassNames(base, architecture), _Places({module: module for module in added})
    duplicates = updates.keys() - matches.keys() - {*absent}  # `Adapter.is_duplicate_bias`, which PEFT saves
    places.paths.update((module, in_model(module)) for module in sorted(duplicates))
    counts = _count_experts(base)
    asked: dict[str, list[str]] = {}  # name in the file, or path of a stack -> modules of the source
    factored, replaced = {}, {}
    for module, matched in matches.items():
        update, part = updates[module], _expert_part(module, matched[0], base)
        for match in matched:
            place_update(source, module, 1.0, match, specs, base.model_types, matches)
        name = part.fused if part else module_of_matches(base, module, matched)
        path = in_model(name)
        places.paths[module] = path if part or update.cls.stack else module_path(path)
        asked.setdefault(name, []).append(module)
        if part and not update.cls.stack:
            in_stack = matched[0].expert is not None  # in the file
            experts = specs[matched[0].name].shape[0] if in_stack else counts[part.fused]
            _add_to_stack(places, path, module, update, part, experts)
        role = "router" if is_bare_router(base, places.paths[module]) else "linear"
        if update.rank and not update.cls.stack and not part and is_bare(in_model.family, path, role):
            places.parameters.add(places.paths[module])
        elif update.cls is ReplaceTensor:
            replaced[name] = path
        else:
            factored[name] = path
    stacked = next((module for module in matches if updates[module].cls.stack), None)
    if places.stacks and stacked:  # its layout depends on the version of PEFT, and differs from the new stacks'
        raise InputError(f"of {source.name} is a stack of experts, and others are single", culprit=stacked)
    lacking = [module for module, path in places.paths.items() if not path]
    if lacking:
        raise cannot_convert(
            source.name, f"are not in {in_model.chosen.name if in_model.chosen else base.path}", lacking, among=updates
        )
    if problems := names_not_found(base, in_model, factored, replaced):
        reason = next(iter(problems.values()))
        unsupported = [module for name in problems for module in asked[name]]
        raise cannot_convert(source.name, f"would not load ({reason})", unsupported, among=updates)
    twice = {path: m for m, path in places.paths.items() if path not in places.stacks}
    for module, path in places.paths.items():
        if twice.get(path, module) != module:
            raise InputError(f"and {module} of {source.name} are one module of the class", culprit=twice[path])
    return places


def module_of_matches(base: Checkpoint, module: str, matches: Sequence[Match]) -> str:
    """Return the name of a tensor for `ClassNames`: its name in the file, or the name of its part of a fused tensor."""
    (first, *others) = matches
    if first.rows is None:
        return module if others else first.name
    parts = fused_parts(first.name, base.specs[first.name], base.configs)
    paths = (part.module for part in parts if (part.start, part.skip) == (first.rows[0], first.rows[2]))
    path = next(paths, None)
    if path is None:
        raise InputError(f"is a part of {first.name} in {base.path}, which has no known class", culprit=module)
    return path if path.endswith(".bias") else f"{path}.weight"


def _expert_part(module: str, match: Match, base: Checkpoint) -> ExpertPart | None:
    """Return the rows of a stack that an update changes, by the name in the file or in the adapter."""
    return expert_part(match.name, base.model_types) or (
        expert_part(module, base.model_types) if match.expert is not None else None
    )


def _count_experts(base: Checkpoint) -> dict[str, int]:
    """Return the number of single experts in the file, by the path of their stack."""
    experts: dict[str, set[int]] = {}
    for part in (expert_part(name, base.model_types) for name in base.specs):
        if part:
            experts.setdefault(part.fused, set()).add(part.expert)
    return {path: len(numbers) for path, numbers in experts.items()}


def _add_to_stack(places: _Places, path: str, module: str, update: UpdateSpec, part: ExpertPart, experts: int) -> None:
    """Add the update of one expert to the stack; raise InputError if it does not fit into it."""
    stack = places.stacks.setdefault(path, _Stack(path, experts, part.parts))
    if update.cls is not LowRank:
        raise InputError(
            f"is {update.kind} of one expert, and PEFT's stacks of experts take plain LoRA", culprit=module
        )
    first = next(iter(stack.modules.values()), update)
    if update.scale != first.scale:
        raise InputError(
            f"has the scale {update.scale:g}, and {first.module}, of the same stack, {first.scale:g}",
            culprit=module,
            remedy="convert it with --plain first, which puts the scales into the factors",
        )
    if (part.expert, part.part) in stack.modules:
        raise InputError("is the same expert", culprit=f"{module} and {stack.modules[part.expert, part.part].module}")
    stack.modules[part.expert, part.part] = update


def _new_key(key: str, module: str, update: UpdateSpec, places: _Places, wrappers: Mapping[str, str]) -> str:
    """Return the key with the class's name for a tensor that PEFT saves as `key` of a module of the source."""
    new = places.paths[module]
    if update.cls.stack:
        return wrappers[new] + ".lora_" + key.rpartition(".lora_")[2]
    if module.endswith(".bias"):
        module, new = module.removesuffix(".bias"), new.removesuffix(".bias")
    return new + key.removeprefix(module)
