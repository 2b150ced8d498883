"""Plan an adapter as a runtime loads it and applies it in full: by the rows of `architectures.runtimes.table`.

Kinds that are LoRA when multiplied out, DoRA and initial factors become plain LoRA; modules get the runtime's names,
experts apart or stacked; what it needs beside them is added as zeros; ranks and scales are made one where it knows one;
and the rule by which it finds modules is held over every path. What it cannot be given is refused by name.
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
from .finish import finish, own_type, plain
from .language import refuse_unsaid_init
from .lazy import Transformed, noted, only, with_modules, without_bases
from .numbers import Settled
from .request import ConvertRequest, select_updates, selected
from .runtime_limits import refusals, require_served, tower_of
from .served import BaseModules, ServedModule, as_served, is_looked_up, modules_as_they_are
from .served_output import serve
from .to_class import to_class

_MAGNITUDE = ".lora_magnitude_vector"


def prepare_for_runtime(
    state: Transformed, request: ConvertRequest
) -> tuple[Transformed, ConvertRequest, Checkpoint | None]:
    """Return the adapter without copies of the base's weights, the request, made plain if need be, and the base.

    Raises:
        NeedsFlag: the runtime cannot be given some modules; or only the base tells the names.
        InputError: it can be given none of them, or does not serve the class of the base with adapters.
    """
    source, runtime = state.adapter, RUNTIMES[request.runtime or ""]
    base = request.base.open("--base is the model that is served") if request.base else None
    kept = selected(source, request.exclude)
    found = refusals(source, runtime, base, kept)
    surely = [each for each in found if base or runtime.reads.get(each.what) != "class"]  # whatever the base is
    lost = {module for each in surely for module in each.modules}
    if surely and not any(update.rank for module, update in kept.items() if module not in lost):
        message = f"by {runtime.title}, {surely[0].says}, and nothing else is left"
        raise InputError(message, culprit=surely[0].modules[0])
    if base is None and loaded_by(runtime.key).key == Peft.key and runtime.names != "whole":
        other = next((module for module in kept if not re.fullmatch(LLAMA, module)), None)
        if other:
            raise _needs_base(f"only the base tells whether such a module is loaded by {runtime.title}", other)
    if found:
        refused = [module for each in found for module in each.modules]
        rest = {module: update for module, update in kept.items() if module not in refused}
        if base and runtime.every_layer:
            _require_set(runtime, base, serve_modules(runtime, base, source, rest)[0])
        listed = ", ".join(refused[:3]) + (", ..." if refused[3:] else "")
        reasons = "; ".join(each.says for each in found)
        options = exclude_all(refused, [*rest])
        raise NeedsFlag(
            f"{runtime.title} cannot have {len(refused)} modules of {source.name} ({reasons}): {listed}",
            flags=options,
            why="to leave them out; a merge has them in the base",
        )
    dora = runtime.reads["dora"] != "yes" and any(update.cls is DoRA for update in kept.values())
    init = runtime.names != "whole" and base_mutating_init(source.config) is not None
    if runtime.names != "whole":  # and a weight of its own under the factors was refused
        state = without_bases(state)
    asked = request.plain or request.initial is not None or request.rank is not None
    return state, replace(request, plain=asked or dora or init), base


def _needs_base(message: str, module: str) -> NeedsFlag:
    return NeedsFlag(message, culprit=module, flags="--base BASE", why="with the model that is served")


def plan_for_runtime(state: Transformed, request: ConvertRequest, base: Checkpoint | None) -> Settled:
    """Plan the output for a runtime that reads PEFT's folders.

    Args:
        request, base: as `prepare_for_runtime` returns them.

    Raises:
        NeedsFlag: a step needs the base, or the adapter as it was before training, or another rank.
        InputError: a path is not one that the runtime looks up.
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
        made = _with_magnitudes(finish(state, request))
        return noted(made, *unchecked)
    source = state.adapter
    there, added = serve_modules(runtime, base, source, source.updates)
    _require_taken(runtime, base, there)
    made = serve(state, runtime, there, request.dtype or own_type(request))
    return noted(made, *_added_note(runtime, added), *_flag_notes(runtime, base, source, there), *unchecked)


def serve_modules(
    runtime: Runtime, base: Checkpoint | None, source: Adapter, kept: Mapping[str, UpdateSpec]
) -> tuple[dict[str, ServedModule], list[ServedModule]]:
    """Return all modules of the output by their paths, and those of them that are zeros, which were added.

    Args:
        source: with the names of the class, where the runtime takes stacks of experts.

    Raises:
        NeedsFlag: only the base tells what has to be beside a module.
        InputError: two modules would be one.
    """
    served = require_served(runtime, base)
    known = BaseModules(base, runtime, served) if base else None
    there = _by_path(known.of_adapter(source, kept) if known and not served.stacks else modules_as_they_are(kept))
    added = _missing(runtime, known, served.stacks, there)
    config = base.config if base else {}
    found = _by_path(part for each in there.values() for part in as_served(runtime, served, each, config))
    for part in (part for each in added for part in as_served(runtime, served, each, config)):
        found.setdefault(part.path, part)
    return found, [module for module in found.values() if module.update is None]


def _with_magnitudes(made: Settled) -> Settled:
    """Let the names of DoRA's magnitudes end in `.weight`, which PEFT and transformers both read."""
    adapter, moved, keys = made.adapter, dict[str, UpdateSpec](), dict[str, str]()
    for module, update in adapter.updates.items():
        names = {role: name + ".weight" * name.endswith(_MAGNITUDE) for role, name in update.tensors.items()}
        keys |= {names[role]: name for role, name in update.tensors.items()}
        keys |= {update.base: update.base} if update.base else {}
        moved[module] = replace(update, tensors=names)
    changed = with_modules(made, {}, moved, keys, adapter.format)
    return replace(made, adapter=replace(changed.adapter, config=adapter.config))


def _by_path(modules: Iterable[ServedModule]) -> dict[str, ServedModule]:
    found: dict[str, ServedModule] = {}
    for module in modules:
        other = found.setdefault(module.path, module)
        if other is not module:
            raise InputError(f"{' and '.join((*other.sources, *module.sources))} would both be it", culprit=module.path)
    return found


def _missing(
    runtime: Runtime, known: BaseModules | None, stacks: bool, there: Mapping[str, ServedModule]
) -> list[ServedModule]:
    """Return modules of zeros that the runtime needs beside those that are there."""
    if known is None:
        if lacking := _lacking(runtime, there):
            path, what = lacking
            raise _needs_base(
                f"for {runtime.title} it has to have {what} beside it, and only the base tells its shape", path
            )
        return []
    found = [*known.beside(there, runtime.needs)]
    found += known.layers(there) if runtime.every_layer else ()
    if runtime.whole_experts:
        found += known.stacks(there) if stacks else known.experts(there)
    return list({each.path: each for each in found}.values())


def _lacking(runtime: Runtime, there: Mapping[str, ServedModule]) -> tuple[str, str] | None:
    """Return a module, and what the runtime needs beside it and the adapter does not have; None if nothing."""
    for path in there:
        owner, _, last = path.rpartition(".")
        for name in runtime.needs.get(last, ()):
            if f"{owner}.{name}" not in there:
                return path, f"{owner}.{name}"
        if runtime.every_layer:
            return path, "the same module of every layer"
    return None


def _require_taken(runtime: Runtime, base: Checkpoint | None, there: Mapping[str, ServedModule]) -> None:
    """Raise InputError for a path or a rank that the runtime does not take, or a module that it would not find set."""
    lost = next((path for path in there if not is_looked_up(runtime, path)), None)
    if lost:
        raise InputError(f"is no module that {runtime.title} looks up", culprit=lost)
    rank, largest = max((module.rank, path) for path, module in there.items())
    if runtime.max_ranks and rank > max(runtime.max_ranks):
        raise InputError(
            f"has rank {rank}, and {runtime.title} takes at most {max(runtime.max_ranks)}",
            culprit=largest,
            remedy=f"loratool resize --rank {max(runtime.max_ranks)} first",
        )
    if base:
        _require_set(runtime, base, there)


def _require_set(runtime: Runtime, base: Checkpoint, there: Collection[str]) -> None:
    """Raise InputError for a module of the base for which the runtime would have memory that nothing sets."""
    if unset := unset_module(runtime, base, there):
        raise InputError(
            f"would compute with memory that is not set: {runtime.title} goes by last names, and the adapter has "
            f"nothing for it",
            culprit=unset,
            remedy="merge the adapter into its base",
        )


def unset_module(runtime: Runtime, base: Checkpoint, there: Collection[str]) -> str | None:
    """Return a module of the base for which a runtime would have memory that nothing sets, as it goes by last names."""
    if not (runtime.every_layer and runtime.targets == "last names"):
        return None
    lasts = {path.rpartition(".")[2] for path in there}
    known = BaseModules(base, runtime, require_served(runtime, base))
    beside = (path for path in known.shapes if ".experts." not in path)
    return next((path for path in beside if path not in there and path.rpartition(".")[2] in lasts), None)


def _added_note(runtime: Runtime, added: Sequence[ServedModule]) -> tuple[str, ...]:
    if not added:
        return ()
    what = f"{len(added)} modules of zeros are added, as for {runtime.title} they have to be beside the others"
    return (f"{what}: {added[0].path}",)


def _flag_notes(
    runtime: Runtime, base: Checkpoint | None, source: Adapter, there: Mapping[str, ServedModule]
) -> Iterator[str]:
    """Yield what the runtime leaves out anyway, and the flags without which it would not take all of the adapter."""
    if runtime.limit:
        yield runtime.limit
    if turned := [path for path, module in there.items() if module.heads]:
        what = f"the rows of {len(turned)} queries and keys are in the order of {runtime.title}, like {turned[0]}"
        yield f"{what}: the output is for nothing else, and says so"
    rank = max(module.rank for module in there.values())
    if runtime.rank_flag and rank > runtime.default_rank:
        value = next(value for value in runtime.max_ranks if value >= rank)
        yield f"start {runtime.title} with {runtime.rank_flag} {value}"
    if not (runtime.tower_flag and base and require_served(runtime, base).towers):
        return
    in_tower = tower_of(source, base, source.updates)
    if any(in_tower(name) for module in there.values() for name in module.sources):
        yield f"start {runtime.title} with {runtime.tower_flag}, without which towers stay as they are"
