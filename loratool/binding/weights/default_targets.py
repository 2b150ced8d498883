"""Choose weights that get no factors unless a pattern names them, and find those that an adapter can store in full."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ...architectures.beside_layers import GATES, MTP, ROUTERS, Layers
from ...architectures.experts import expert_part
from ...architectures.prefixes import module_path
from ...architectures.roles import weight_role
from ...files.checkpoint import Checkpoint, Headers
from ..modules.resolve import strip_wrappers
from ..modules.selection import PRESETS, matches_pattern
from ..names.class_names import ClassNames
from ..names.peft_names import is_bare_router, is_plain

LAYERS_ALONE = frozenset({"all-linear", *PRESETS})  # patterns that only match modules in layers


def find_unnamed(base: Headers, in_model: ClassNames | None, patterns: Sequence[str]) -> dict[str, str]:
    """Return tensors beside a model's layers that no pattern names -> their group (`GROUPS`).

    A pattern that also matches tensors of other groups or of the layers, like q_proj, does not name MTP layers.
    """
    path_of = {
        name: in_model.in_main_class(name) if in_model else name for name in base.specs
    }  # a bare class has shorter paths
    layers = Layers.find(path_of.values(), base.config)
    groups = {}
    for name, path in path_of.items():
        module, shape = module_path(path), base.specs[name].shape
        if group := layers.group(module, weight_role(module, len(shape), True), shape):
            groups[name] = group
    naming = [pattern for pattern in patterns if pattern not in LAYERS_ALONE]
    if not naming:
        return groups
    parts = {name: expert_part(strip_wrappers(name), base.model_types) for name in base.specs}
    paths = {name: in_model(name) if in_model else name for name in base.specs}
    fused = {part.fused: in_model(part.fused) if in_model else part.fused for part in parts.values() if part}
    spellings = {
        name: {module_path(name), module_path(path), *([fused[part.fused]] if (part := parts[name]) else [])}
        for name, path in paths.items()
    }

    def is_named(patterns: Sequence[str], paths: Collection[str]) -> bool:
        return any(matches_pattern(pattern, path) for pattern in patterns for path in paths)

    others = {path for name, paths_of in spellings.items() if groups.get(name) != MTP for path in paths_of}
    of_mtp = [pattern for pattern in naming if not is_named([pattern], others)]
    return {n: group for n, group in groups.items() if not is_named(of_mtp if group == MTP else naming, spellings[n])}


@dataclass(frozen=True)
class SavedModule:
    """A router or gate that PEFT saves as a module, with the modules in it."""

    path: str  # in the class
    tensors: tuple[str, ...]  # their names in the files


def kept_whole(base: Checkpoint, in_model: Callable[[str], str], unnamed: Mapping[str, str]) -> dict[str, SavedModule]:
    """Return each tensor of a router or gate that PEFT saves as a module -> that module.

    These are the routers and gates without factors, and the routers that are not linear layers. A module with codes is
    skipped.

    Args:
        unnamed: the result of `find_unnamed`.
    """
    paths = {name: in_model(name) for name in base.specs}
    saved = set()
    for name, path in paths.items():
        owner = path.rpartition(".")[0]
        if unnamed.get(name) in (ROUTERS, GATES) or is_bare_router(base, owner):
            saved.add(owner)
    members: dict[str, list[str]] = {}
    for name, path in paths.items():
        ends = (i for i, character in enumerate(path) if character == ".")
        if owner := next((path[:end] for end in ends if path[:end] in saved), ""):  # the outermost
            members.setdefault(owner, []).append(name)
    modules = [SavedModule(owner, tuple(names)) for owner, names in members.items()]
    plain = [module for module in modules if all(is_plain(base, name, base.specs[name]) for name in module.tensors)]
    return {name: module for module in plain for name in module.tensors}
