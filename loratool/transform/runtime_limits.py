"""Find the parts of an adapter that a runtime supports in no form, by the rows of `architectures.runtimes.table`."""

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
from .base_copies import equals_base
from .served import BaseModules, as_served, is_looked_up

# Other features of adapters, which only PEFT and transformers apply
OTHERS = {
    "convolutions": "LoRA on convolutions",
    "others": "LoRA on other embeddings than the vocabulary's",
    "never": "LoRA on modules like these",
    "replaced": "weights of their own under the factors",
    "names": "modules of such names",
    "absent": "modules that the base does not have",
}

# The subjects of a finding
FINDINGS = (*FEATURES, *OTHERS, "format", "kind", "start", "targets", "rank", "rows", "missing", "limit", "scale")


def require_served(runtime: Runtime, base: Checkpoint | None) -> Served:
    """Return how the runtime serves the class of the base.

    Raises:
        InputError: it serves that class without adapters, or is not known to serve it.
    """
    if base is None:
        return runtime.served
    name, kind = declared_class(base.config), base.config.get("model_type")
    if name in runtime.without:
        raise InputError(f"{runtime.title} {runtime.version} serves {name} without adapters", culprit=str(base.path))
    if not runtime.classes:
        return runtime.served
    if served := runtime.classes.get(f"{kind}:{name}", runtime.classes.get(name)):
        return served
    what = f"is {name} of type {kind}" if name else "names no class in its config.json"
    known = f"{runtime.title} {runtime.version} is not known to serve with adapters"
    raise InputError(f"{what}, which {known}", culprit=str(base.path))


def refusals(
    source: Adapter, runtime: Runtime, base: Checkpoint | None, updates: Mapping[str, UpdateSpec]
) -> list[Finding]:
    """Return findings on the updates that the runtime does not apply, whatever the output."""
    served, unsupported = require_served(runtime, base), dict[tuple[str, str], list[str]]()
    able = {*served.heads, *(["towers"] if served.towers else []), *(["experts"] if served.takes_experts else [])}
    tensors = _tensors(source, base, updates)
    in_tower = _in_tower(base, tensors)
    known = BaseModules(base, runtime, served) if base and runtime.names != "whole" and not served.stacks else None
    for module, update in updates.items():
        feature = feature_of(module, update, in_tower)
        outcome = runtime.reads.get(feature, "yes")
        if feature in OTHERS and runtime.names != "whole":
            outcome = runtime.miss
        elif outcome == "class":
            outcome = "yes" if feature in able else "ignores" if feature == "towers" else "refuses"
        if update.base and runtime.names != "whole" and not equals_base(source, update, base):
            feature, outcome = "replaced", "ignores"
        elif base and update.rank and module not in tensors and not (known and known.is_of_runtime(module, update)):
            feature, outcome = "absent", runtime.miss
        elif served.never and any(re.search(served.never, path) for path in (module, *tensors.get(module, ()))):
            feature, outcome = "never", runtime.miss
        if outcome != "yes":
            unsupported.setdefault((feature, outcome), []).append(module)
    refused = {module for modules in unsupported.values() for module in modules}
    if base and loaded_by(runtime.key).can.named_by_model:
        updates = {module: update for module, update in updates.items() if module not in refused}
        for module, feature in _outside_graph(source, base, updates).items():
            outcome = "ignores" if feature == "never" else "refuses"
            unsupported.setdefault((feature, outcome), []).append(module)
        return [_refusal(feature, outcome, tuple(modules)) for (feature, outcome), modules in unsupported.items()]
    rest = {module: update for module, update in updates.items() if module not in refused}
    if base and known:
        for served_module in known.of_adapter(source, rest):
            owner, _, last = served_module.path.rpartition(".")
            names = () if ".experts." in served_module.path else runtime.needs.get(last, ())
            needed = [f"{owner}.{name}" for name in names]
            alone = any(path not in known.shapes and path not in known.runtime_shapes for path in needed)
            parts = as_served(runtime, served, served_module, base.config)
            if alone or not all(is_looked_up(runtime, part.path) for part in parts):
                unsupported.setdefault(("names", runtime.miss), []).extend(served_module.sources)
    return [_refusal(feature, outcome, tuple(modules)) for (feature, outcome), modules in unsupported.items()]


def _outside_graph(source: Adapter, base: Checkpoint, updates: Mapping[str, UpdateSpec]) -> dict[str, str]:
    """Return the modules without a name in GGUF files, and those that llama.cpp computes without LoRA."""
    model = GgufModel.of_config(base.config, str(base.path))
    adapter = source.only(updates)
    unfit = {module: "names" for modules in unfit_modules(adapter, model).values() for module in modules}
    rest = {module: update for module, update in updates.items() if module not in unfit}
    _, origins = to_gguf_names(adapter.only(rest), model)
    dead = never_applied(model.architecture.key, origins)
    return unfit | {module: "never" for path in dead for module in origins[path]}


def _refusal(feature: str, outcome: str, modules: tuple[str, ...]) -> Finding:
    what = {**FEATURES, **OTHERS}[feature]
    says = f"{what} would be {OUTCOMES[outcome]}"
    return Finding(feature, outcome, says, "only a merge into the base applies them there", modules)


def feature_of(module: str, update: UpdateSpec, in_tower: Callable[[str], bool]) -> str:
    """Return an update's key in FEATURES or OTHERS; empty for plain LoRA, or DoRA, of a linear layer."""
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


def _tensors(source: Adapter, base: Checkpoint | None, updates: Mapping[str, UpdateSpec]) -> dict[str, list[str]]:
    """Return, for each module in the base, the paths that it changes in the model with all components."""
    if base is None:
        return {}
    specs, _ = bindable(base, find_tie(base))
    matches, _ = resolve_modules(specs, source.only(updates), base.configs)
    path_in_model = ClassNames(base).in_main_class
    return {
        module: [module_path(path_in_model(match.name)) for match in matched] for module, matched in matches.items()
    }


def tower_of(source: Adapter, base: Checkpoint | None, updates: Mapping[str, UpdateSpec]) -> Callable[[str], bool]:
    """Return a function that checks whether a module of an adapter is outside its base's language model."""
    return _in_tower(base, _tensors(source, base, updates))


def _in_tower(base: Checkpoint | None, tensors: Mapping[str, Sequence[str]]) -> Callable[[str], bool]:
    """Return a function that checks whether a module is outside a base's language model."""
    starts = text_model_at(base.config) if base else ()
    if not starts:
        return lambda module: False
    inside = {module for module, paths in tensors.items() if any(f"{path}.".startswith(starts) for path in paths)}
    return (tensors.keys() - inside).__contains__
