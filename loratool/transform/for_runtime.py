"""Plan an adapter for a runtime, so that it loads and applies all of it (`architectures.runtimes.table`).

DoRA, initial factors and kinds that multiply out to LoRA become plain LoRA. Modules get the runtime's names, with
experts one by one or stacked. Modules of zeros are added where the runtime needs them. Ranks and scales become equal if
the runtime supports only one. Every path is checked against the runtime's rule for modules. Unsupported modules are
refused with an error that names them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..adapters.adapter import Adapter
from ..adapters.formats import FORMATS, loaded_by
from ..adapters.formats.peft import Peft
from ..adapters.formats.peft_config import base_mutating_init
from ..adapters.updates.dora import DoRA
from ..adapters.updates.update import UpdateSpec
from ..architectures.runtimes.runtime import LLAMA, Runtime
from ..architectures.runtimes.table import RUNTIMES
from ..binding.names.peft_names import exclude_all
from ..errors import InputError, NeedsFlag
from ..files.checkpoint import Checkpoint
from .finish import default_dtype, finish, plain
from .language import refuse_unsaid_init
from .lazy import Transformed, noted, only, with_modules, without_bases
from .numbers import Settled
from .refusals import TO_EXCLUDE, refuse_classifier
from .request import ConvertRequest, select_updates, selected
from .runtime_limits import refusals, require_served, tower_of
from .served import BaseModules, ServedModule, as_served, is_looked_up, unchanged_modules
from .served_output import serve
from .to_class import to_class

_MAGNITUDE = ".lora_magnitude_vector"


def prepare_for_runtime(
    state: Transformed, request: ConvertRequest
) -> tuple[Transformed, ConvertRequest, Checkpoint | None]:
    """Return the adapter without copies of the base's weights, the request, with `plain` if needed, and the base.

    Raises:
        NeedsFlag: the runtime does not support some modules, or the names need the base.
        InputError: it supports none of them, or serves the class of the base without adapters.
    """
    source, runtime = state.adapter, RUNTIMES[request.runtime or ""]
    base = request.base.open("--base is the model that is served") if request.base else None
    updates = selected(source, request.exclude)
    findings = refusals(source, runtime, base, updates)
    # those that no base changes
    surely = [finding for finding in findings if base or runtime.reads.get(finding.what) != "class"]
    surely_refused = {module for finding in surely for module in finding.modules}
    if surely and not any(update.rank for module, update in updates.items() if module not in surely_refused):
        message = f"by {runtime.title}, {surely[0].says}, and nothing else is left"
        raise InputError(message, culprit=surely[0].modules[0])
    if base is None and loaded_by(runtime.key).key == Peft.key and runtime.names != "whole":
        other = next((module for module in updates if not re.fullmatch(LLAMA, module)), None)
        if other:
            raise _needs_base(f"only the base tells whether such a module is loaded by {runtime.title}", other)
    if findings:
        refused = [module for finding in findings for module in finding.modules]
        refuse_classifier(source.name, f"an adapter that {runtime.title} serves", refused, updates)
        rest = {module: update for module, update in updates.items() if module not in refused}
        if base and runtime.every_layer:
            _require_set(runtime, base, serve_modules(runtime, base, source, rest)[0])
        listed = ", ".join(refused[:3]) + (", ..." if refused[3:] else "")
        reasons = "; ".join(finding.says for finding in findings)
        options = exclude_all(refused, [*rest])
        raise NeedsFlag(
            f"{runtime.title} does not support {len(refused)} modules of {source.name} ({reasons}): {listed}",
            flags=options,
            why=TO_EXCLUDE,
        )
    dora = runtime.reads["dora"] != "yes" and any(update.cls is DoRA for update in updates.values())
    init = runtime.names != "whole" and base_mutating_init(source.config) is not None
    if runtime.names != "whole":  # a trained weight under the factors was refused above
        state = without_bases(state)
    is_requested = request.plain or request.initial is not None or request.rank is not None
    return state, replace(request, plain=is_requested or dora or init), base


def _needs_base(message: str, module: str) -> NeedsFlag:
    return NeedsFlag(message, culprit=module, flags="--base BASE", why="with the model that is served")


def plan_for_runtime(state: Transformed, request: ConvertRequest, base: Checkpoint | None) -> Settled:
    """Plan the output for a runtime that reads PEFT's folders.

    Args:
        request, base: as `prepare_for_runtime` returns them.

    Raises:
        NeedsFlag: a step needs the base, the adapter before training, or another rank.
        InputError: the runtime does not look up a path.
    """
    runtime = RUNTIMES[request.runtime or ""]
    state = only(state, select_updates(state.adapter, request))
    if request.plain:
        state = plain(state, request)
    served = require_served(runtime, base)
    unchecked = () if base else (f"without --base the names are not compared with those of {runtime.title}",)
    if base and (runtime.names == "whole" or served.stacks):
        state = to_class(state, base, request.architecture)
    if runtime.names == "whole":
        refuse_unsaid_init(state.adapter, FORMATS[Peft.key])
        output = _with_magnitudes(finish(state, request))
        return noted(output, *unchecked)
    source = state.adapter
    modules, added = serve_modules(runtime, base, source, source.updates)
    _require_taken(runtime, base, modules)
    output = serve(state, runtime, modules, request.dtype or default_dtype(request))
    return noted(output, *_added_note(runtime, added), *_flag_notes(runtime, base, source, modules), *unchecked)


def serve_modules(
    runtime: Runtime, base: Checkpoint | None, source: Adapter, updates: Mapping[str, UpdateSpec]
) -> tuple[dict[str, ServedModule], list[ServedModule]]:
    """Return all modules of the output by their paths, and the added modules of zeros among them.

    Args:
        source: with the names of the class, if the runtime takes stacks of experts.

    Raises:
        NeedsFlag: the modules that a module needs beside it depend on the base.
        InputError: two modules would have one path.
    """
    served = require_served(runtime, base)
    known = BaseModules(base, runtime, served) if base else None
    in_base = known.of_adapter(source, updates) if known and not served.stacks else unchanged_modules(updates)
    modules = _by_path(in_base)
    added = _missing(runtime, known, served.stacks, modules)
    config = base.config if base else {}
    served_modules = _by_path(
        part for module in modules.values() for part in as_served(runtime, served, module, config)
    )
    for part in (part for served_module in added for part in as_served(runtime, served, served_module, config)):
        served_modules.setdefault(part.path, part)
    return served_modules, [module for module in served_modules.values() if module.update is None]


def _with_magnitudes(state: Settled) -> Settled:
    """Append `.weight` to the names of DoRA's magnitudes; PEFT and transformers both read such names."""
    adapter, moved, keys = state.adapter, dict[str, UpdateSpec](), dict[str, str]()
    for module, update in adapter.updates.items():
        names = {role: name + ".weight" * name.endswith(_MAGNITUDE) for role, name in update.tensors.items()}
        keys |= {names[role]: name for role, name in update.tensors.items()}
        keys |= {update.base: update.base} if update.base else {}
        moved[module] = replace(update, tensors=names)
    changed = with_modules(state, {}, moved, keys, adapter.format)
    return replace(state, adapter=replace(changed.adapter, config=adapter.config))


def _by_path(modules: Iterable[ServedModule]) -> dict[str, ServedModule]:
    by_path: dict[str, ServedModule] = {}
    for module in modules:
        other = by_path.setdefault(module.path, module)
        if other is not module:
            raise InputError(
                f"{' and '.join((*other.sources, *module.sources))} would both become this module", culprit=module.path
            )
    return by_path


def _missing(
    runtime: Runtime, known: BaseModules | None, stacks: bool, modules: Mapping[str, ServedModule]
) -> list[ServedModule]:
    """Return modules of zeros that the runtime needs beside these."""
    if known is None:
        if lacking := _lacking(runtime, modules):
            path, what = lacking
            raise _needs_base(f"needs {what} beside it for {runtime.title}, and only the base tells its shape", path)
        return []
    zeros = [*known.beside(modules, runtime.needs)]
    zeros += known.layers(modules) if runtime.every_layer else ()
    if runtime.whole_experts:
        zeros += known.stacks(modules) if stacks else known.experts(modules)
    return list({module.path: module for module in zeros}.values())


def _lacking(runtime: Runtime, modules: Mapping[str, ServedModule]) -> tuple[str, str] | None:
    """Return a module, and a module that the runtime needs beside it and the adapter lacks; None if there is none."""
    for path in modules:
        owner, _, last = path.rpartition(".")
        for name in runtime.needs.get(last, ()):
            if f"{owner}.{name}" not in modules:
                return path, f"{owner}.{name}"
        if runtime.every_layer:
            return path, "the same module of every layer"
    return None


def _require_taken(runtime: Runtime, base: Checkpoint | None, modules: Mapping[str, ServedModule]) -> None:
    """Raise InputError for a path or a rank that the runtime does not support, or a module that it leaves unset."""
    unknown = next((path for path in modules if not is_looked_up(runtime, path)), None)
    if unknown:
        raise InputError(f"is not a module that {runtime.title} looks up", culprit=unknown)
    rank, largest = max((module.rank, path) for path, module in modules.items())
    if runtime.max_ranks and rank > max(runtime.max_ranks):
        raise InputError(
            f"has rank {rank}, and {runtime.title} takes at most {max(runtime.max_ranks)}",
            culprit=largest,
            remedy=f"loratool resize --rank {max(runtime.max_ranks)} first",
        )
    if base:
        _require_set(runtime, base, modules)


def _require_set(runtime: Runtime, base: Checkpoint, modules: Collection[str]) -> None:
    """Raise InputError for a module of the base for which the runtime would use uninitialized memory."""
    if unset := unset_module(runtime, base, modules):
        raise InputError(
            f"would compute with uninitialized memory: {runtime.title} matches last names, and the adapter has "
            "no factors for it",
            culprit=unset,
            remedy="merge the adapter into its base",
        )


def unset_module(runtime: Runtime, base: Checkpoint, modules: Collection[str]) -> str | None:
    """Return a module of the base for which a runtime, which matches last names, would use uninitialized memory."""
    if not (runtime.every_layer and runtime.targets == "last names"):
        return None
    lasts = {path.rpartition(".")[2] for path in modules}
    known = BaseModules(base, runtime, require_served(runtime, base))
    beside = (path for path in known.shapes if ".experts." not in path)
    return next((path for path in beside if path not in modules and path.rpartition(".")[2] in lasts), None)


def _added_note(runtime: Runtime, added: Sequence[ServedModule]) -> tuple[str, ...]:
    if not added:
        return ()
    what = f"{len(added)} modules of zeros are added, since {runtime.title} needs them beside the others"
    return (f"{what}: {added[0].path}",)


def _flag_notes(
    runtime: Runtime, base: Checkpoint | None, source: Adapter, modules: Mapping[str, ServedModule]
) -> Iterator[str]:
    """Yield notes on what the runtime never applies, and on the flags that it needs to apply all of the adapter."""
    if runtime.limit:
        yield runtime.limit
    if reordered := [path for path, module in modules.items() if module.heads]:
        what = f"the rows of {len(reordered)} queries and keys are in the order of {runtime.title}, like {reordered[0]}"
        yield f"{what}: the output is only for this runtime, and records that"
    rank = max(module.rank for module in modules.values())
    if runtime.rank_flag and rank > runtime.default_rank:
        value = next(value for value in runtime.max_ranks if value >= rank)
        yield f"start {runtime.title} with {runtime.rank_flag} {value}"
    if not (runtime.tower_flag and base and require_served(runtime, base).towers):
        return
    in_tower = tower_of(source, base, source.updates)
    if any(in_tower(name) for module in modules.values() for name in module.sources):
        yield f"start {runtime.title} with {runtime.tower_flag}, without which towers stay as they are"
