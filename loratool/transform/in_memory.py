"""Open an adapter converted to another format without writing it, for commands that take --to or several adapters.

`convert` plans it, and its tensors are computed when they are loaded. So a command sees the names, the fused modules
and the ranks of its output, and modules of several adapters match by meaning, not by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS, capabilities, usual_format
from ..architectures.families import FAMILIES
from ..architectures.families.table import DENOISERS, Naming
from ..binding.modules.image_modules import (
    KNOWN,
    SourceModule,
    detect_families,
    detect_family,
    find_unknown_modules,
    read_source_modules,
    refuse_unknown_blocks,
)
from ..binding.modules.misfits import exclude_options, exclude_patterns
from ..binding.modules.selection import Selection, matches_pattern
from ..errors import InputError, NeedsFlag
from ..views.convert import ModuleConvert
from .expand import expand
from .lazy import Transformed, loss_of, start, with_scales_of
from .log import Change
from .module_map import TargetModule, plan_target_modules
from .output import content, unused_modules
from .plan import plan_convert
from .regroup import regroup
from .request import ConvertRequest, alpha_notes, request_for
from .same_layout import to_one_layout
from .value_modules import plan_values, read_value_modules, rows_by_module


def open_converted(
    state: Transformed,
    request: ConvertRequest,
    command: str,
    folder: Path,
    opened: ExitStack,
    family: str | None = None,
) -> Transformed:
    """Return the adapter as if it had been converted and opened again.

    Args:
        command: the command that converts, for the remedies of errors.
        folder: for temporary files; `opened` closes them.
        family: a key of FAMILIES, if other adapters determine it.
    """
    source, to = state.adapter, FORMATS[request.to]
    with request_for(command):
        output = plan_convert(_with_standard_names(state, request.to), request, folder, opened, family)
    adapter = with_scales_of(output, to.opened(source.name, source.file, content(output)))
    return Transformed(adapter, {m: output.log.get(m, Change((m,))) for m in adapter.updates}, state.notes)


def _with_standard_names(state: Transformed, to: str) -> Transformed:
    """Return an adapter with the names that formats other than its own have for its modules."""
    source = state.adapter
    named = source if source.format == to else FORMATS[source.format].with_standard_names(source)
    return state if named is source else start(named)


def loss_warnings(states: Sequence[Transformed]) -> tuple[str, ...]:
    """Return the notes on the steps of the inputs, and a warning if a step had rounding errors."""
    errors = [
        loss.relative
        for state in states
        for module, change in state.log.items()
        if (loss := change.loss.then(loss_of(state.adapter.file, module))).relative
    ]
    notes = tuple(dict.fromkeys(note for state in states for note in state.notes))
    if not errors:
        return notes
    return (
        *notes,
        f"{len(errors)} modules of the input could not be converted exactly: at most {max(errors):.0e} of a change is "
        "lost, as `loratool convert` shows",
    )


def rank_notes(like: Adapter, ranks: Mapping[str, int]) -> tuple[str, ...]:
    """Return the note on the alphas, which equal the ranks, if files of the output's format do not hold them."""
    return alpha_notes(like.format, [ModuleConvert(m, (m,), "exact", rank, float(rank)) for m, rank in ranks.items()])


@dataclass(frozen=True)
class CommonFormat:
    """Adapters of one format and layout."""

    states: Sequence[Transformed]
    exclude: tuple[str, ...]  # the patterns that apply to the new names
    excluded: Sequence[str] = ()  # modules that were excluded by their former names


def convert_to_common_format(
    states: Sequence[Transformed], to: str | None, exclude: tuple[str, ...], folder: Path, opened: ExitStack
) -> CommonFormat:
    """Convert adapters to one format, with the first adapter's layout of fused and split modules.

    Args:
        to: a key of `written_formats`; if None, adapters that differ in format or spelling get the first one's.
        exclude: patterns of modules to exclude, by their names before or after.
    """
    adapters = [state.adapter for state in states]
    if to is None and are_alike(adapters):
        with request_for("combine"):
            return CommonFormat(to_one_layout(states, keep_first=True), exclude)
    family = common_family(adapters)
    _require_known(adapters, family)
    request = ConvertRequest(to or adapters[0].format, exclude)
    with request_for("combine"):
        states = [_with_standard_names(state, request.to) for state in states]
    converted = [open_converted(state, request, "combine", folder, opened, family) for state in states]
    known = [module for adapter in adapters for module in adapter.updates]
    new_modules = [module for state in converted for module in state.adapter.updates]
    rest = [
        p
        for p in exclude
        if any(matches_pattern(p, m) for m in new_modules) or not any(matches_pattern(p, module) for module in known)
    ]
    with request_for("combine"):
        alike = to_one_layout(converted, keep_first=True)
    return CommonFormat(
        alike,
        tuple(rest),
        [m for former, state in zip(states, converted, strict=True) for m in unused_modules(former.adapter, state)],
    )


def _require_known(adapters: Sequence[Adapter], family: str | None) -> None:
    """Raise InputError for adapters of no known family if no loader reads their formats or suffixes together."""
    first = adapters[0]
    for adapter in adapters if family is None else ():
        if adapter.format != first.format and not (is_of_one(adapter) and is_of_one(first)):
            raise InputError(
                f"is in the {adapter.format} format, {first.name} in {first.format}'s, and of no image model that is "
                f"known ({KNOWN}): combine adapters of one format",
                culprit=adapter.name,
            )
        if (first_suffixes := _factor_suffixes(first)) != (suffixes := _factor_suffixes(adapter)):
            raise InputError(
                f"spells its factors {' '.join(suffixes)}, {first.name} {' '.join(first_suffixes)}, and is of no known "
                f"image model ({KNOWN}): no loader reads both in one file",
                culprit=adapter.name,
            )


def is_of_one(adapter: Adapter) -> bool:
    """Return whether files of the adapter's format are for one model, not for the components of an image model."""
    return capabilities(adapter).components == "one"


def are_alike(adapters: Sequence[Adapter]) -> bool:
    """Return whether adapters have one format and one spelling, so that a module has the same name in all of them."""
    if len({_naming(adapter) for adapter in adapters}) > 1:
        return False
    names: dict[tuple[str, str], str] = {}
    return all(
        names.setdefault(meaning, module) == module
        for adapter in adapters
        for meaning, module in _modules_by_meaning(adapter).items()
    )


def _naming(adapter: Adapter) -> tuple[object, ...]:
    """Return the format, the suffixes, and whether the denoiser's names differ from diffusers'."""
    renamed = any(t.component in DENOISERS and t.path != t.parts[0].source.path for t in _targets(adapter))
    return adapter.format, _factor_suffixes(adapter), renamed


def _factor_suffixes(adapter: Adapter) -> tuple[str, ...]:
    """Return the suffixes of the factors' names, for other kinds those as LoRA; empty for formats with one pair."""
    format = FORMATS[adapter.format]
    keys = [
        update.tensors.get(role) or format.tensor_name(module, role)
        for module, update in adapter.updates.items()
        for role in ("A", "B")
        if update.rank
    ]
    return tuple(sorted({format.spelling(key) for key in keys} - {""}))


def _modules_by_meaning(adapter: Adapter) -> dict[tuple[str, str], str]:
    """Return (component, path in diffusers' names) -> the module that holds it, alone or fused with others."""
    modules = {
        (target.component, target.path.removeprefix("text_model.")): part.source.module
        for target in _targets(adapter)
        for part in target.parts
    }
    family = detect_family(_all_sources(adapter))
    for value in read_value_modules(adapter):
        for path in (rows_by_module(value, family) if family else None) or ():
            key = value.source.component, path.removeprefix("text_model.") + value.end
            modules.setdefault(key, value.source.module)
    return modules


def _all_sources(adapter: Adapter) -> list[SourceModule]:
    """Return the modules that determine the family of an adapter, also those without factors."""
    return [*read_source_modules(adapter)[0], *(value.source for value in read_value_modules(adapter))]


def _targets(adapter: Adapter) -> list[TargetModule]:
    """Return an image adapter's targets in diffusers' names. They serve for names only, so DoRA is not refused."""
    sources, _ = read_source_modules(adapter)
    family = detect_family(sources)
    plain = [replace(source, update=source.update.cls.without_norm(source.update)) for source in sources]
    return plan_target_modules(plain, family, Naming.DIFFUSERS) if family else []


def common_family(adapters: Sequence[Adapter]) -> str | None:
    """Return the image family of several adapters; None if it is unknown.

    Denoisers decide if there are any. Modules that fit several families get the family of the other adapters.

    Raises:
        InputError: the adapters are of two families.
    """
    sources = {id(adapter): _all_sources(adapter) for adapter in adapters}
    fitting: list[tuple[Adapter, tuple[str, ...]]] = []
    for adapter in adapters:
        modules = sources[id(adapter)]
        families = detect_families(modules)
        if not families or any(source.component in DENOISERS for source in modules):
            fitting.append((adapter, families))
    for (first, first_families), (second, second_families) in combinations(fitting, 2):
        if (first_families or second_families) and set(first_families).isdisjoint(second_families):
            both = first_families, second_families
            names = [FAMILIES[keys[0]].title if keys else "no known image model" for keys in both]
            raise InputError(
                f"is of {names[1]}, {first.name} of {names[0]}: they have no base in common", culprit=second.name
            )
    common = [key for key in fitting[0][1] if all(key in families for _, families in fitting)] if fitting else []
    return common[0] if common else detect_family([source for modules in sources.values() for source in modules])


def by_meaning(adapters: Sequence[Adapter], selection: Selection) -> Sequence[Transformed]:
    """Return image adapters under diffusers' names, with fused modules split.

    Without a known family, modules that are fused in one adapter and split in another are split. Adapters with the same
    spelling are returned unchanged.

    Raises:
        NeedsFlag: a selected module is in no known model.
        InputError: the adapters are of two models.
    """
    states = [start(adapter) for adapter in adapters]
    if not all(detect_family(_all_sources(adapter)) for adapter in adapters):
        with request_for("diff"):
            return to_one_layout(states, keep_first=False)
    if are_alike(adapters):
        return states
    with request_for("diff"):
        states = [expand(state) for state in states]
    adapters = [state.adapter for state in states]
    read = [read_source_modules(adapter) for adapter in adapters]
    family = common_family(adapters)
    assert family is not None
    regrouped = []
    for state, (sources, impossible) in zip(states, read, strict=True):
        adapter = state.adapter
        refuse_unknown_blocks(adapter, sources, family)
        values = {v.source.module: (v, rows_by_module(v, family)) for v in read_value_modules(adapter)}
        placed = {module for module, (_, rows) in values.items() if rows is not None}
        unknown = {*impossible, *find_unknown_modules(sources, family)} - placed
        known = [source for source in sources if source.module not in unknown]
        if unknown_selected := [m for m in adapter.updates if m in unknown and selection.selects(m)]:
            others = [module for other_adapter in adapters for module in other_adapter.updates if module not in unknown]
            raise NeedsFlag(
                f"of {adapter.name} is in no known image model, and could be any of the other adapter's",
                culprit=unknown_selected[0],
                flags=exclude_options(exclude_patterns(unknown_selected, others)),
            )
        with request_for("diff"):
            targets = {
                _name(target.component, target.path, family): target
                for target in plan_target_modules(known, family, Naming.DIFFUSERS)
            }
        named = {
            _name(value.source.component, path, family) + value.end: (value, spans)
            for value, rows in values.values()
            for path, spans in (rows or {}).items()
        }
        regrouped.append(regroup(state, targets, beside=plan_values(adapter, named)))
    return regrouped


def _name(component: str, path: str, family: str) -> str:
    path = f"text_model.{path}" if path.startswith("encoder.layers.") else path
    return usual_format("pipeline").module_name(component, path, family)
