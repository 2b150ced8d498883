"""Find the weights of a base that PEFT can wrap, and the names of its class that PEFT would not find or would mistake.

Files keep historical names, while PEFT uses modules. A weight that PEFT would not find is refused here, before
anything is written: PEFT skips an unknown key with at most a warning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from ...adapters.formats.peft import DECLARED
from ...architectures.beside_layers import Layers
from ...architectures.peft import (
    BARE_ROUTERS,
    BYPASSED,
    GROUPED_CONVS,
    GROUPED_LINEAR,
    OTHER_LOOKUPS,
    REFUSED,
    RESHAPED,
    STACKED_BY_PEFT,
    STACKED_MODULES,
)
from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...errors import InputError, NeedsFlag, shell_word
from ...files.checkpoint import Checkpoint
from ...files.dtypes import FLOATS, TensorSpec
from ..modules.selection import matches_pattern
from .class_names import ClassNames

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert in a path


def role_in_model(base: Checkpoint, name: str, in_model: str, spec: TensorSpec) -> str:
    """Return the role of a weight (`architectures.roles`, or router) that PEFT can wrap, else an empty string.

    The role is empty for a bare parameter and for nn.MultiheadAttention, where PEFT wraps both matrices or neither. It
    is also empty for a grouped convolution, which PEFT accepts only with some ranks or does not merge (a depthwise
    convolution with a single input channel looks the same).
    """
    module = module_path(in_model)
    role = weight_role(module, len(spec.shape), is_plain(base, name, spec) and spec.size > 0)
    inside = name.endswith(".out_proj.weight") and name.removesuffix("out_proj.weight") + "in_proj_weight"
    stacked = any(module.rpartition(".")[2] in STACKED_MODULES.get(each, ()) for each in base.model_types)
    if role == "experts" or (role == "conv" and stacked and len(spec.shape) == 3):
        return "experts"
    if not in_model.endswith(".weight") or inside in base.specs:
        return ""
    if role == "linear" and is_bare_router(base, module):
        return "router"
    if role == "conv" and any(module.rpartition(".")[2] in GROUPED_CONVS.get(each, ()) for each in base.model_types):
        return ""
    return "" if role == "conv" and spec.shape[1] == 1 < spec.shape[0] else role


def is_bare(family: str, in_model: str, role: str) -> bool:
    """Return whether PEFT's config must list a weight as a parameter: no linear layer has it, or PEFT mistakes it.

    PEFT identifies experts by their last names only; as a parameter such a layer gets the same factors.

    Args:
        family: the model type of the class.
        in_model: the weight's name in the class.
    """
    taken = STACKED_BY_PEFT.get(family, frozenset()) | GROUPED_LINEAR.get(family, frozenset())
    return role in ("experts", "router") or (role == "linear" and module_path(in_model).rpartition(".")[2] in taken)


def is_bypassed(family: str, in_model: str) -> bool:
    """Return whether PEFT's factors for a weight (its name in a class of this type) would have no effect."""
    return module_path(in_model).rpartition(".")[2] in BYPASSED.get(family, ())


def looks_up_otherwise(base: Checkpoint, in_model: str) -> bool:
    """Return whether PEFT would add the factors of an embedding (its name in the class) to other rows."""
    last = module_path(in_model).rpartition(".")[2]
    return any(last in OTHER_LOOKUPS.get(each, ()) for each in base.model_types)


def is_plain(base: Checkpoint, name: str, spec: TensorSpec) -> bool:
    """Return whether a tensor has numbers, not codes."""
    return spec.dtype in FLOATS and name not in base.formats


def is_bare_router(base: Checkpoint, module: str) -> bool:
    """Return whether a module (its path in the model) chooses among experts and is not called as a linear layer."""
    ends = (".router", ".router.classifier", "mlp.gate", "mixer.gate")
    return module.endswith(ends) and not BARE_ROUTERS.isdisjoint(base.model_types)


def refuse_unsaid(
    base: Checkpoint,
    in_model: ClassNames,
    factored: Mapping[str, str],
    kept_exactly: Mapping[str, str],
    uses: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Refuse an adapter with a tensor that PEFT would not find or would mistake for another.

    Args:
        factored: the weights with factors, name in the file -> name in the class.
        kept_exactly: the tensors that are kept exactly, name in the file -> name in the class.
        uses: weights with factors for several modules -> the names of these modules in the class.

    Raises:
        NeedsFlag: PEFT would not find some tensors; the error has --exclude options for them.
        InputError: nothing would be left, or PEFT loads no adapter of this family.
    """
    refuse_family(base)
    problems = names_not_found(base, in_model, factored, kept_exactly) | _without_module(base, in_model, uses or {})
    if not problems:
        return
    usable = [module_path(name) for name in (*factored, *kept_exactly) if name not in problems]
    first, reason = next(iter(problems.items()))
    others = f", and {len(problems) - 1} more that PEFT cannot name" if problems.keys() - {first} else ""
    if not any(name not in problems for name in factored):
        raise InputError(f"{reason}{others}, and nothing else is left", culprit=first)
    options = exclude_all([module_path(name) for name in problems], usable)
    raise NeedsFlag(f"{reason}{others}", culprit=first, flags=options)


def refuse_family(base: Checkpoint) -> None:
    """Raise InputError if PEFT loads no adapter of the base's model type."""
    for family in base.model_types:
        if family in REFUSED:
            raise InputError(f"no adapter of a {family} would load: {REFUSED[family]}", culprit=str(base.path))


def names_not_found(
    base: Checkpoint, in_model: ClassNames, factored: Mapping[str, str], kept_exactly: Mapping[str, str]
) -> dict[str, str]:
    """Return the tensors that PEFT would not find, name in the file -> reason."""
    family, both = in_model.family, {**factored, **kept_exactly}
    reshaped = [RESHAPED[t] for t in base.model_types if t in RESHAPED]
    # others are targeted by an expression (`target_modules`), but in some types PEFT accepts only last names
    named = both if family in STACKED_BY_PEFT else kept_exactly
    doubtful = _named_twice(base, in_model, named.values()) | _unknown_order(factored.values())
    layers = Layers.find(both.values(), base.config)
    reasons = {}
    for name, path in both.items():
        module = module_path(path).removesuffix(".bias")
        if layers.is_mtp(path):
            reasons[name] = f"is of an MTP layer, and transformers loads no MTP layer of a {family}"
        elif any(re.search(pattern, module) for pattern in reshaped):
            reasons[name] = f"PEFT finds no module of a {family} for it"
        elif name in kept_exactly and path.endswith(".bias"):
            continue
        elif path in doubtful:
            reasons[name] = f"PEFT cannot tell {module} from other modules"
    return reasons


def _without_module(base: Checkpoint, in_model: ClassNames, uses: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return weights that are also a head that PEFT would not find -> reason.

    The module under the head's name contains other modules, so it is not the head.
    """
    owners = {in_model(name).rpartition(".")[0] for name in base.specs} if uses else set()
    reasons = {}
    for name, paths in uses.items():
        for module in map(module_path, paths):
            if any(owner.startswith(f"{module}.") for owner in owners):
                reasons[name] = f"it is also its head, which is not a module {module}"
    return reasons


def target_modules(base: Checkpoint, in_model: ClassNames, modules: Collection[str]) -> list[str] | str:
    """Return `target_modules` of PEFT's config for exactly these modules.

    PEFT takes every module with a path that ends in a listed path. If that includes another module, as for git's head
    `output`, the result is an expression for full paths.
    """
    if not _named_twice(base, in_model, [f"{module}.weight" for module in modules]):
        return sorted(modules)
    return "|".join(map(re.escape, sorted(modules)))


def _named_twice(base: Checkpoint, in_model: ClassNames, names: Collection[str]) -> set[str]:
    """Return the names of modules whose path is the end of another module's path, so that PEFT takes both."""
    paths = {in_model(name).rpartition(".")[0] for name in base.specs}
    inner = {part for path in paths for part in path.split(".")[1:]}
    suspects = {name for name in names if name.partition(".")[0] in inner}
    if not suspects:
        return set()
    parts = [path.split(".") for path in paths]
    ends = {".".join(each[i:j]) for each in parts for j in range(2, len(each) + 1) for i in range(1, j)}
    return {name for name in suspects if module_path(name) in ends}


def _unknown_order(names: Collection[str]) -> set[str]:
    """Return bare parameters with an unknown order of declaration, in which PEFT nests its wrappers."""
    stacks: dict[str, set[str]] = {}
    for owner, _, parameter in (name.rpartition(".") for name in names if not name.endswith(".weight")):
        stacks.setdefault(owner, set()).add(parameter)
    unknown = {
        owner for owner, parameters in stacks.items() if len(parameters) > 1 and not parameters.issubset(DECLARED)
    }
    return {name for name in names if name.rpartition(".")[0] in unknown}


def exclude_all(modules: Sequence[str], others: Sequence[str]) -> str:
    """Return --exclude options for all of `modules` and nothing of `others`.

    Modules that differ only in numbers share one pattern.
    """
    options: dict[str, None] = {}
    general = {NUMBER.sub("0", module): module for module in modules}
    for module in general.values():
        last = module.rpartition(".")[2]
        number = "re:^" + r"\d+".join(map(re.escape, NUMBER.split(module))) + "$"
        free = [p for p in (last, number) if not any(matches_pattern(p, path) for path in others)]
        group = [each for each in modules if matches_pattern(number, each)]
        options.update(dict.fromkeys(free[:1] or group))
    return " ".join(f"--exclude {shell_word(pattern)}" for pattern in options)
