"""Prepare an image model's adapter for a program, so that it applies all of it (`architectures.runtimes`).

Modules and text encoders that the program does not load are refused by name. DoRA gets magnitudes for a program that
divides by other norms, and becomes LoRA for one that applies none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS, loaded_by
from ..adapters.formats.content import ONLY_FOR
from ..adapters.formats.format import Format
from ..adapters.updates.dora import DoRA
from ..adapters.updates.update import UpdateSpec
from ..architectures.families import FAMILIES
from ..architectures.families.table import DENOISERS
from ..architectures.runtimes.image_programs import IMAGE_RUNTIMES
from ..architectures.runtimes.runtime import ImageRuntime
from ..binding.modules.image_modules import SourceModule, settle_components
from ..binding.names.peft_names import exclude_all
from ..errors import InputError, NeedsFlag
from .base_norms import to_base_norms
from .lazy import noted
from .module_map import TargetModule, plan_target_modules
from .numbers import Settled
from .refusals import cannot_convert
from .request import ConvertRequest, selected


def require_family(runtime: ImageRuntime, family: str, name: str) -> None:
    """Raise InputError for a family that a program loads no adapters of. name: of the adapter."""
    if family not in runtime.families and not runtime.newer:
        known = ", ".join(FAMILIES[key].title for key in FAMILIES if key in runtime.families)
        message = f"is of {FAMILIES[family].title}, and {runtime.title} {runtime.version} loads adapters of {known}"
        raise InputError(message, culprit=name)


def unloaded_modules(
    runtime: ImageRuntime, to: str, family: str, sources: Sequence[SourceModule]
) -> Iterator[tuple[str, str]]:
    """Yield the modules that a program does not load, each with the reason.

    Args:
        to: a key of FORMATS, the format that the program reads.
    """
    first, *_ = (each.name for each in FAMILIES[family].components)
    loaded, rest = (first, *runtime.components.get(family, ())), []
    for source in settle_components(sources, FAMILIES[family]):
        if source.component not in loaded and family in runtime.families:
            yield source.module, f"of {source.component}, whose adapters it does not load from such a file"
        elif source.component in DENOISERS:
            rest.append(source)
    if expression := runtime.modules.get(family):
        for target in plan_target_modules(rest, family, FORMATS[to].naming(family)) if rest else ():
            if not re.fullmatch(expression, target.path):
                yield from ((part.source.module, "outside of the blocks that it adapts") for part in target.parts)


def notes_on_names(
    to: Format, family: str, sources: list[SourceModule], targets: Mapping[str, TargetModule]
) -> Iterator[str]:
    """Yield a note for each program that reads a format but looks for other names of some modules.

    Args:
        targets: the modules of the output by their names.
    """
    for key in to.also_loaded_by:
        row = IMAGE_RUNTIMES[key]
        if family in row.families and not FAMILIES[family].up_attention:  # a UNet's are looked for in both namings
            own = {each.path for each in plan_target_modules(sources, family, loaded_by(key).naming(family))}
            if others := [name for name, target in targets.items() if target.path not in own]:
                what = f"{row.title} looks for other names of {len(others)} modules, like {others[0]}"
                yield f"{what}, and ignores these; `loratool convert --for {key}` writes its names"


def is_known_kind(runtime: ImageRuntime, update: UpdateSpec, family: str = "") -> bool:
    """Return whether a program applies an update's kind as a merge does, apart from DoRA's norms.

    Args:
        family: a key of FAMILIES, for kinds that it applies in this family alone.
    """
    kind = update.cls.without_norm(update).kind
    unread = any(
        kind == of_kind and name.endswith(end) and axes in (0, len(update.specs[role].shape))
        for (of_kind, end), axes in runtime.unread.items()
        for role, name in update.tensors.items()
    )
    return kind in runtime.kinds | runtime.family_kinds.get(family, frozenset()) and not unread


def divides_otherwise(runtime: ImageRuntime, update: UpdateSpec) -> bool:
    """Return whether a program divides a DoRA by the norms of W, and not by those of W + D."""
    return update.cls is DoRA and not update.along_inputs and runtime.dora == "base"


def ignores_norm(runtime: ImageRuntime, update: UpdateSpec) -> bool:
    """Return whether a program applies a DoRA as if it were LoRA, or not at all."""
    return update.cls is DoRA and not (runtime.along_inputs if update.along_inputs else runtime.dora != "none")


def prepare_for_image_program(
    source: Adapter, runtime: ImageRuntime, request: ConvertRequest, family: str, wanted: Sequence[SourceModule]
) -> ConvertRequest:
    """Return the request, with `plain` if the program does not apply DoRA.

    Raises:
        NeedsFlag: the program does not load some modules, or DoRA needs the base.
        InputError: it loads no adapters of the family.
    """
    require_family(runtime, family, source.name)
    updates = selected(source, request.exclude)
    if unloaded := dict(unloaded_modules(runtime, request.to, family, wanted)):
        rest = [module for module, update in updates.items() if module not in unloaded and update.rank]
        listed = ", ".join([*unloaded][:3]) + (", ..." if len(unloaded) > 3 else "")
        reasons = "; ".join(dict.fromkeys(unloaded.values()))
        message = f"{runtime.title} does not load {len(unloaded)} modules of {source.name} ({reasons}): {listed}"
        if not rest:
            raise InputError(f"{message}; nothing else is left")
        raise NeedsFlag(message, flags=exclude_all([*unloaded], rest), why="to exclude them")
    if any(ignores_norm(runtime, update) for update in updates.values()):
        return replace(request, plain=True)
    others = [module for module, update in updates.items() if divides_otherwise(runtime, update)]
    if others and not request.plain and (request.base is None or request.base.is_config):
        raise NeedsFlag(
            f"is DoRA along the outputs ({len(others)} modules), which {runtime.title} divides by the norm of the "
            "base's weight without the change",
            culprit=others[0],
            flags="--base BASE",
            why="with the model, for magnitudes that undo that; or with --plain too, for LoRA of a --rank",
        )
    return request


def finish_for_image_program(
    planned: Settled, runtime: ImageRuntime, request: ConvertRequest, source: Adapter
) -> Settled:
    """Return the planned output with the magnitudes of a program that divides DoRA by the norms of W.

    Raises:
        NeedsFlag: the program does not apply some changes without factors.
        InputError: it applies none of the adapter's, or a base does not fit.
    """
    unknown = {m: u for m, u in planned.adapter.updates.items() if not is_known_kind(runtime, u, planned.family or "")}
    if unknown:
        modules = list(dict.fromkeys(name for module in unknown for name in planned.log[module].sources))
        kinds = ", ".join(dict.fromkeys(update.kind for update in unknown.values()))
        what = f"({kinds}) are not known to be applied by {runtime.title}"
        raise cannot_convert(source.name, what, modules, among=selected(source, request.exclude))
    if planned.family not in runtime.families:
        title = FAMILIES[planned.family or ""].title
        planned = noted(planned, f"{runtime.title} {runtime.version} has no {title}: newer ones were not checked")
    others = [m for m, update in planned.adapter.updates.items() if divides_otherwise(runtime, update)]
    if not others:
        return planned
    assert request.base, "prepare_for_image_program asked for it"
    made = to_base_norms(planned, others, request.base.open("--base is the model under it"))
    what = f"the magnitudes of {len(others)} modules of DoRA are for the norms that {runtime.title} divides by"
    note = f"{what}: the output is only for this program, and records that"
    return noted(replace(made, metadata={**made.metadata, ONLY_FOR: runtime.key}), note)
