"""Tell which weights of a base PEFT can wrap, and under which names of the class that config.json declares.

Files keep historical names, PEFT goes by modules. A weight that PEFT would not find is refused here, before a byte is
written: PEFT skips a key that it does not know with a warning at most.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from shlex import quote

from ..adapters.formats.peft import DECLARED
from ..architectures.backbones import BACKBONES, in_task_model
from ..architectures.classes import ModelClass, classes_of
from ..architectures.config_tensors import declared_class
from ..architectures.peft import (
    BARE_MODULES,
    BARE_ROUTERS,
    ENCODER_DECODERS,
    MAMBA_REFUSED,
    MAMBAS,
    REFUSED,
    RESHAPED,
    STACKED_BY_PEFT,
)
from ..architectures.prefixes import CONTAINER_PREFIXES, module_path
from ..architectures.renames import canonical, expert_part
from ..architectures.roles import weight_role
from ..errors import InputError, NeedsFlag, UsageError
from ..files.checkpoint import Checkpoint
from ..files.dtypes import FLOATS, TensorSpec
from .resolve import strip_wrappers
from .selection import matches_pattern

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a layer or an expert in a path


def class_of(base: Checkpoint, architecture: str | None = None) -> ModelClass | None:
    """Return the class that PEFT wraps: `architecture`, or the one that config.json declares.

    Returns:
        None if config.json declares none, or an image model is made of parts.

    Raises:
        UsageError: the base can be loaded with no class of this name, as far as is known here.
    """
    known = classes_of(base.config)
    if architecture is None:
        return known.get(declared_class(base.config))
    if architecture not in known:
        remedy = f"there are {', '.join(known)}" if known else "none is known for this base"
        raise UsageError(f"no class of {base.path} is named so", culprit=architecture, remedy=remedy)
    return known[architecture]


def namer(base: Checkpoint, architecture: str | None = None) -> Callable[[str], str]:
    """Return a function from a tensor's name in the file to its name in the class that PEFT wraps.

    That is an empty string for a tensor that the class does not have.

    Raises:
        UsageError: as `class_of`.
    """
    types, chosen = base.model_types, class_of(base, architecture)
    sides = {}
    if base.model_type in ENCODER_DECODERS:
        sides = {side: _types_of(base.config.get(side)) for side in ("encoder", "decoder")}
    prefix = BACKBONES.get(base.model_type or "")
    whole = chosen is None or any(strip_wrappers(name).startswith(f"{prefix}.") for name in base.specs)

    def in_model(name: str) -> str:
        name = strip_wrappers(name)
        side, _, rest = name.partition(".")
        if side in sides:
            return f"{side}.{canonical(rest, sides[side])}"
        found = canonical(name, types)
        found = found if whole else in_task_model(found, base.model_type)
        return chosen.path(found) if chosen else found

    return in_model


def absent_from_class(base: Checkpoint, architecture: str | None) -> tuple[str, ...]:
    """Return a sentence on the tensors that the class chosen does not have; empty if none was chosen or it has all."""
    if architecture is None:
        return ()
    in_model, whole = namer(base, architecture), namer(base)
    owners = Counter(_top(whole(name) or name) for name in base.specs if not in_model(name))
    if not owners:
        return ()
    listed = ", ".join(f"{owner} ({count})" for owner, count in owners.items())
    return (f"{architecture} has no {listed}: these tensors get nothing",)


def _top(path: str) -> str:
    """Return the start of a path that names a part of the model: its head, the tower of its backbone."""
    parts = path.split(".")
    return ".".join(parts[: 2 if parts[0] in CONTAINER_PREFIXES else 1])


def _types_of(config: object) -> tuple[str, ...]:
    kind = config.get("model_type") if isinstance(config, dict) else None
    return (kind,) if isinstance(kind, str) else ()


def role_in_model(base: Checkpoint, name: str, in_model: str, spec: TensorSpec) -> str:
    """Return the role of a weight (`architectures.roles`) that PEFT can wrap, else an empty string.

    It is empty for a bare parameter, for a depthwise convolution, which PEFT does not merge (a convolution with a
    single input channel looks the same), for nn.MultiheadAttention, of which PEFT wraps both matrices or neither, and
    for what PEFT refuses of Mambas.
    """
    module = module_path(in_model)
    role = weight_role(module, len(spec.shape), is_plain(base, name, spec) and spec.size > 0)
    inside = name.endswith(".out_proj.weight") and name.removesuffix("out_proj.weight") + "in_proj_weight"
    if role == "experts":
        return role
    if not in_model.endswith(".weight") or inside in base.specs or is_bare_router(base, module):
        return ""
    if base.model_type in MAMBAS and module.rpartition(".")[2] in MAMBA_REFUSED:
        return ""
    return "" if role == "conv" and spec.shape[1] == 1 < spec.shape[0] else role


def is_plain(base: Checkpoint, name: str, spec: TensorSpec) -> bool:
    """Return whether a tensor has numbers and no codes."""
    return spec.dtype in FLOATS and name not in base.formats


def is_bare_router(base: Checkpoint, module: str) -> bool:
    """Return whether a module, by its path in the model, chooses among experts and is no linear layer."""
    routes = module.endswith((".router", "mlp.gate", "mixer.gate"))
    return routes and not BARE_ROUTERS.isdisjoint(base.model_types) and base.model_type not in STACKED_BY_PEFT


def bare_routers(base: Checkpoint, in_model: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Map each tensor of a router that PEFT can only save entirely to all tensors of that router.

    A router is left out if one of its tensors cannot be trained.
    """
    owners: dict[str, list[str]] = {}
    for name in base.specs:
        module = in_model(name).rpartition(".")[0]
        if is_bare_router(base, module):
            owners.setdefault(module, []).append(name)
    whole = [names for names in owners.values() if all(is_plain(base, n, base.specs[n]) for n in names)]
    return {name: tuple(names) for names in whole for name in names}


def refuse_unsaid(
    base: Checkpoint,
    factored: Mapping[str, str],
    whole: Mapping[str, str],
    heads: Mapping[str, str] | None = None,
    architecture: str | None = None,
) -> None:
    """Refuse an adapter with a tensor that PEFT would not find or would take for another.

    Args:
        factored: the weights with factors, name in the file -> name in the model.
        whole: the tensors that are kept exactly, likewise.
        heads: embeddings with factors -> the head that is the same matrix.
        architecture: as in `namer`.

    Raises:
        NeedsFlag: some tensors are such; it names the --exclude options that leave them out.
        InputError: nothing would be left, or PEFT loads no adapter of this family.
    """
    for family in base.model_types:
        if family in REFUSED:
            raise InputError(f"no adapter of a {family} would load: {REFUSED[family]}", culprit=str(base.path))
    problems = names_not_found(base, factored, whole, architecture) | _without_head(base, heads or {}, architecture)
    if not problems:
        return
    kept = [module_path(name) for name in (*factored, *whole) if name not in problems]
    first, reason = next(iter(problems.items()))
    others = f", and {len(problems) - 1} more that PEFT cannot be told of" if problems.keys() - {first} else ""
    if not any(name not in problems for name in factored):
        raise InputError(f"{reason}{others}, and nothing else is left", culprit=first)
    options = exclude_all([module_path(name) for name in problems], kept)
    raise NeedsFlag(f"{reason}{others}", culprit=first, remedy=f"add {options}")


def names_not_found(
    base: Checkpoint, factored: Mapping[str, str], whole: Mapping[str, str], architecture: str | None
) -> dict[str, str]:
    """Map the names in the file of tensors that PEFT would not find to the reason."""
    chosen, both = class_of(base, architecture), {**factored, **whole}
    family = chosen.model_type if chosen else base.model_type or ""
    taken, reshaped = STACKED_BY_PEFT.get(family), [RESHAPED[t] for t in base.model_types if t in RESHAPED]
    doubtful = _named_twice(base, whole.values(), namer(base, architecture)) | _unknown_order(base, factored)
    found = {}
    for name, in_model in both.items():
        module = module_path(in_model).removesuffix(".bias")
        last = module.rpartition(".")[2]
        if any(re.search(pattern, module) for pattern in reshaped):
            found[name] = f"PEFT finds no module of a {family} for it"
        elif name in whole and in_model.endswith(".bias"):
            continue
        elif any(last in BARE_MODULES.get(each, ()) for each in base.model_types):
            found[name] = f"is no layer that PEFT knows, but a bare parameter of a {family}"
        elif expert_part(name, base.model_types):
            if not taken:
                found[name] = f"is of one expert, and PEFT makes no stack of those of a {family}"
        elif taken and last in taken and name in factored and in_model.endswith(".weight"):
            found[name] = f"PEFT takes every {last} of a {family} for experts'"
        elif family in MAMBAS and last in MAMBA_REFUSED and name in factored:
            found[name] = f"PEFT refuses the {last} of a {family}"
        elif in_model in doubtful:
            found[name] = f"PEFT cannot tell {module} from other modules"
    return found


def _without_head(base: Checkpoint, heads: Mapping[str, str], architecture: str | None) -> dict[str, str]:
    """Map embeddings to the reason why PEFT would not find the head that they are as well.

    The module under the head's name holds other modules, so that it is not the head itself.
    """
    in_model = namer(base, architecture)
    owners = {in_model(name).rpartition(".")[0] for name in base.specs} if heads else set()
    found = {}
    for name, head in heads.items():
        module = module_path(head)
        if any(owner.startswith(f"{module}.") for owner in owners):
            found[name] = f"it is its head as well, which is no module {module}"
    return found


def target_modules(base: Checkpoint, modules: Collection[str], in_model: Callable[[str], str]) -> list[str] | str:
    """Return `target_modules` of PEFT's config for these modules and no others.

    PEFT takes every module whose path ends in a path that is listed; where that is another one too, as where git's head
    is called `output`, an expression has to match the whole path.
    """
    if not _named_twice(base, [f"{module}.weight" for module in modules], in_model):
        return sorted(modules)
    return "|".join(map(re.escape, sorted(modules)))


def _named_twice(base: Checkpoint, names: Collection[str], in_model: Callable[[str], str]) -> set[str]:
    """Return the names whose module's path is the end of another's, so that PEFT takes both."""
    paths = {in_model(name).rpartition(".")[0] for name in base.specs}
    inner = {part for path in paths for part in path.split(".")[1:]}
    suspects = {name for name in names if name.partition(".")[0] in inner}
    if not suspects:
        return set()
    parts = [path.split(".") for path in paths]
    ends = {".".join(each[i:j]) for each in parts for j in range(2, len(each) + 1) for i in range(1, j)}
    return {name for name in suspects if module_path(name) in ends}


def _unknown_order(base: Checkpoint, factored: Mapping[str, str]) -> set[str]:
    """Return bare parameters of modules whose order of declaration is not known; PEFT nests its wrappers by it."""
    stacks: dict[str, set[str]] = {}
    for name, in_model in factored.items():
        if name in base.specs and role_in_model(base, name, in_model, base.specs[name]) == "experts":
            owner, _, parameter = in_model.rpartition(".")
            stacks.setdefault(owner, set()).add(parameter)
    unknown = {owner for owner, own in stacks.items() if len(own) > 1 and not own.issubset(DECLARED)}
    return {in_model for in_model in factored.values() if in_model.rpartition(".")[0] in unknown}


def exclude_all(modules: Sequence[str], kept: Sequence[str]) -> str:
    """Return --exclude options for all of `modules` and nothing of `kept`.

    Modules that differ only in numbers share one pattern.
    """
    options: dict[str, None] = {}
    general = {NUMBER.sub("0", module): module for module in modules}
    for module in general.values():
        last = module.rpartition(".")[2]
        number = "re:^" + r"\d+".join(map(re.escape, NUMBER.split(module))) + "$"
        free = [p for p in (last, number) if not any(matches_pattern(p, path) for path in kept)]
        group = [each for each in modules if matches_pattern(number, each)]
        options.update(dict.fromkeys(free[:1] or group))
    return " ".join(f"--exclude {quote(pattern)}" for pattern in options)
