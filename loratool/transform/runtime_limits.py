"""Tell what of an adapter a runtime cannot be given in any form, by the rows of `architectures.runtimes.table`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ..adapters.adapter import Adapter
from ..adapters.formats import loaded_by
from ..adapters.gguf_names import to_gguf_names, unfit_modules
from ..adapters.gguf_parts import GgufModel
from ..adapters.updates.add import AddDelta
from ..adapters.updates.replace import ReplaceTensor
from ..adapters.updates.rows import ReplaceRows
from ..adapters.updates.update import UpdateSpec
from ..architectures.classes import text_model_at
from ..architectures.config_tensors import declared_class
from ..architectures.prefixes import module_path
from ..architectures.roles import weight_role
from ..architectures.runtimes.llama_cpp import never_applied
from ..architectures.runtimes.runtime import FEATURES, OUTCOMES, Runtime, Served
from ..architectures.ties import INPUT_EMBEDDINGS
from ..binding.modules.resolve import resolve_modules
from ..binding.names.class_names import ClassNames
from ..binding.ties.shared_tensors import bindable
from ..binding.ties.ties import find_tie
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..views.inspect_runtime import Finding
from .base_copies import is_of_base
from .served import BaseModules, as_served, is_looked_up

# What else an adapter may have, which only PEFT and transformers apply
OTHERS = {
    "convolutions": "LoRA on convolutions",
    "others": "LoRA on other embeddings than the vocabulary's",
    "never": "LoRA on modules like these",
    "replaced": "weights of their own under the factors",
    "names": "modules of such names",
    "absent": "modules that the base does not have",
}

# What a finding can be about, beside these
FINDINGS = (*FEATURES, *OTHERS, "format", "kind", "start", "targets", "rank", "rows", "missing", "limit")


def require_served(runtime: Runtime, base: Checkpoint | None) -> Served:
    """Return what the runtime makes of the class of the base.

    Raises:
        InputError: it serves that class without adapters, or it is not known whether it serves it.
    """
    if base is None:
        return runtime.served
    name, kind = declared_class(base.config), base.config.get("model_type")
    if name in runtime.without:
        raise InputError(f"{runtime.title} {runtime.version} serves {name} without adapters", culprit=str(base.path))
    if not runtime.classes:
        return runtime.served
    if found := runtime.classes.get(f"{kind}:{name}", runtime.classes.get(name)):
        return found
    what = f"is {name} of type {kind}" if name else "names no class in its config.json"
    known = f"{runtime.title} {runtime.version} is not known to serve with adapters"
    raise InputError(f"{what}, which {known}", culprit=str(base.path))


def refusals(
    source: Adapter, runtime: Runtime, base: Checkpoint | None, kept: Mapping[str, UpdateSpec]
) -> list[Finding]:
    """Return what of these updates the runtime does not apply, whatever is written."""
    served, found = require_served(runtime, base), dict[tuple[str, str], list[str]]()
    able = {*served.heads, *(["towers"] if served.towers else []), *(["experts"] if served.takes_experts else [])}
    tensors = _tensors(source, base, kept)
    in_tower = _in_tower(base, tensors)
    known = BaseModules(base, runtime, served) if base and runtime.names != "whole" and not served.stacks else None
    for module, update in kept.items():
        feature = feature_of(module, update, in_tower)
        outcome = runtime.reads.get(feature, "yes")
        if feature in OTHERS and runtime.names != "whole":
            outcome = runtime.miss
        elif outcome == "class":
            outcome = "yes" if feature in able else "ignores" if feature == "towers" else "refuses"
        if update.base and runtime.names != "whole" and not is_of_base(source, update, base):
            feature, outcome = "replaced", "ignores"
        elif base and update.rank and module not in tensors and not (known and known.is_own(module, update)):
            feature, outcome = "absent", runtime.miss
        elif served.never and any(re.search(served.never, path) for path in (module, *tensors.get(module, ()))):
            feature, outcome = "never", runtime.miss
        if outcome != "yes":
            found.setdefault((feature, outcome), []).append(module)
    refused = {module for modules in found.values() for module in modules}
    if base and loaded_by(runtime.key).can.named_by_model:
        kept = {module: update for module, update in kept.items() if module not in refused}
        for module, feature in _outside_graph(source, base, kept).items():
            outcome = "ignores" if feature == "never" else "refuses"
            found.setdefault((feature, outcome), []).append(module)
        return [_refusal(feature, outcome, tuple(modules)) for (feature, outcome), modules in found.items()]
    rest = {module: update for module, update in kept.items() if module not in refused}
    if base and known:
        for each in known.of_adapter(source, rest):
            owner, _, last = each.path.rpartition(".")
            needed = () if ".experts." in each.path else [f"{owner}.{name}" for name in runtime.needs.get(last, ())]
            alone = any(path not in known.shapes and path not in known.own_shapes for path in needed)
            parts = as_served(runtime, served, each, base.config)
            if alone or not all(is_looked_up(runtime, part.path) for part in parts):
                found.setdefault(("names", runtime.miss), []).extend(each.sources)
    return [_refusal(feature, outcome, tuple(modules)) for (feature, outcome), modules in found.items()]


def _outside_graph(source: Adapter, base: Checkpoint, kept: Mapping[str, UpdateSpec]) -> dict[str, str]:
    """Return the modules that GGUF files have no name for, and those that llama.cpp computes without LoRA."""
    model = GgufModel.of_config(base.config, str(base.path))
    own = source.only(kept)
    unfit = {module: "names" for modules in unfit_modules(own, model).values() for module in modules}
    rest = {module: update for module, update in kept.items() if module not in unfit}
    _, origins = to_gguf_names(own.only(rest), model)
    dead = never_applied(model.architecture.key, origins)
    return unfit | {module: "never" for path in dead for module in origins[path]}


def _refusal(feature: str, outcome: str, modules: tuple[str, ...]) -> Finding:
    what = {**FEATURES, **OTHERS}[feature]
    says = f"{what} would be {OUTCOMES[outcome]}"
    return Finding(feature, outcome, says, "only a merge into the base has them there", modules)


def feature_of(module: str, update: UpdateSpec, in_tower: Callable[[str], bool]) -> str:
    """Return which of FEATURES or OTHERS an update is; empty for plain LoRA, and DoRA, of a linear layer."""
    last = module.rpartition(".")[2]
    if update.cls is ReplaceRows:
        return "tokens"
    if update.cls is AddDelta or (update.cls is ReplaceTensor and last == "bias"):
        return "bias"
    if not update.rank:
        return "modules_to_save"
    if len(update.shape) > 2 and not update.cls.stack:
        return "convolutions"
    if in_tower(module):
        return "towers"
    if update.cls.stack or ".experts." in module:
        return "experts"
    if update.transposed or weight_role(module, 2, True) == "embedding":
        return "embeddings" if last in INPUT_EMBEDDINGS else "others"
    return "head" if last == "lm_head" or weight_role(module, 2, True) == "head" else ""


def _tensors(source: Adapter, base: Checkpoint | None, kept: Mapping[str, UpdateSpec]) -> dict[str, list[str]]:
    """Return the paths in the model that has all parts of what each module changes, as far as a base has it."""
    if base is None:
        return {}
    specs, _ = bindable(base, find_tie(base))
    matches, _ = resolve_modules(specs, source.only(kept), base.configs)
    whole = ClassNames(base).whole
    return {module: [module_path(whole(match.name)) for match in each] for module, each in matches.items()}


def tower_of(source: Adapter, base: Checkpoint | None, kept: Mapping[str, UpdateSpec]) -> Callable[[str], bool]:
    """Return a function that tells whether a module of an adapter stands beside the language model of its base."""
    return _in_tower(base, _tensors(source, base, kept))


def _in_tower(base: Checkpoint | None, tensors: Mapping[str, Sequence[str]]) -> Callable[[str], bool]:
    """Return a function that tells whether a module stands beside the language model of a base."""
    starts = text_model_at(base.config) if base else ()
    if not starts:
        return lambda module: False
    inside = {module for module, paths in tensors.items() if any(f"{path}.".startswith(starts) for path in paths)}
    return (tensors.keys() - inside).__contains__
