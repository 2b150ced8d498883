"""Tell what of an adapter a runtime cannot be given in any form, by the rows of `architectures.runtimes.table`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ...adapters.adapter import Adapter
from ...adapters.updates.add import AddDelta
from ...adapters.updates.replace import ReplaceTensor
from ...adapters.updates.rows import ReplaceRows
from ...adapters.updates.update import UpdateSpec
from ...architectures.classes import classes_of
from ...architectures.roles import weight_role
from ...architectures.runtimes.runtime import FEATURES, OUTCOMES, Runtime, Served
from ...binding.class_names import ClassNames
from ...binding.resolve import resolve_modules
from ...binding.shared_tensors import bindable
from ...binding.tied_weights import find_tie
from ...errors import InputError
from ...files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Finding:
    """Say what a runtime does with a part of the adapter as it is.

    Attributes:
        what: a key of FEATURES, or `names`, `rank`, `missing` or `convolutions`.
        outcome: a key of OUTCOMES.
        says: a sentence.
        remedy: what `convert --for` writes instead, or why it cannot.
        modules: which it is about, in the adapter's names; empty for all.
    """

    what: str
    outcome: str
    says: str
    remedy: str
    modules: tuple[str, ...] = ()


def require_served(runtime: Runtime, base: Checkpoint | None) -> Served:
    """Return what the runtime makes of the class of the base.

    Raises:
        InputError: it serves that class without adapters, or it is not known whether it serves it.
    """
    if base is None:
        return Served("", embeddings=False)
    served, declared = runtime.served(base.config), base.config.get("architectures")
    if served:
        return served
    name = declared[0] if isinstance(declared, list) and declared else None
    if name in runtime.without:
        raise InputError(f"{runtime.title} {runtime.version} serves {name} without adapters", culprit=str(base.path))
    what = f"is {name}, which is no class" if name else "names no class in its config.json"
    known = f"that {runtime.title} {runtime.version} is known to serve with adapters"
    raise InputError(f"{what} {known}", culprit=str(base.path))


def refusals(
    source: Adapter, runtime: Runtime, base: Checkpoint | None, kept: Mapping[str, UpdateSpec]
) -> list[Finding]:
    """Return what of these updates the runtime does not apply, whatever is written."""
    served, found = require_served(runtime, base), dict[str, list[str]]()
    able = {"embeddings": served.embeddings, "head": served.embeddings, "towers": served.towers, "experts": True}
    in_tower = _in_tower(source, base, kept)
    for module, update in kept.items():
        feature = feature_of(module, update, in_tower)
        outcome = runtime.reads.get(feature, "yes")
        if feature == "convolutions" and runtime.names == "file":
            outcome = runtime.miss
        if outcome != "yes" and not (outcome == "class" and able[feature]):
            found.setdefault(feature, []).append(module)
    return [_refusal(runtime, served, feature, tuple(modules)) for feature, modules in found.items()]


def _refusal(runtime: Runtime, served: Served, feature: str, modules: tuple[str, ...]) -> Finding:
    outcome, where = runtime.reads.get(feature, runtime.miss), runtime.title
    if outcome == "class":
        outcome, where = "ignores" if feature == "towers" else "refuses", f"{where}'s {served.name or 'class'}"
    says = f"{where} does not apply {FEATURES.get(feature, feature)}: {OUTCOMES[outcome]}"
    return Finding(feature, outcome, says, "only a merge into the base has them there", modules)


def feature_of(module: str, update: UpdateSpec, in_tower: Callable[[str], bool]) -> str:
    """Return which of FEATURES an update is, or `convolutions`; empty for plain LoRA, and DoRA, of a linear layer."""
    last = module.rpartition(".")[2]
    if update.cls is ReplaceRows:
        return "tokens"
    if update.cls is AddDelta or (update.cls is ReplaceTensor and last == "bias"):
        return "bias"
    if not update.rank:
        return "modules_to_save"
    if in_tower(module):
        return "towers"
    if update.cls.stack or ".experts." in module:
        return "experts"
    if len(update.shape) > 2:
        return "convolutions"
    if update.transposed or weight_role(module, 2, True) == "embedding":
        return "embeddings"
    return "head" if last == "lm_head" or weight_role(module, 2, True) == "head" else ""


def _in_tower(source: Adapter, base: Checkpoint | None, kept: Mapping[str, UpdateSpec]) -> Callable[[str], bool]:
    """Return a function that tells whether a module stands beside the language model of a base."""
    kind = base.config.get("model_type") if base else None
    text = next((each for each in classes_of(base.config).values() if each.model_type != kind), None) if base else None
    if base is None or text is None:
        return lambda module: False
    specs, _ = bindable(base, find_tie(base))
    matches, _ = resolve_modules(specs, replace(source, updates=dict(kept)), base.configs)
    whole = ClassNames(base).whole
    beside = {module for module, each in matches.items() if not any(text.path(whole(match.name)) for match in each)}
    return beside.__contains__
